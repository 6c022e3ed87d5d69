"""A validated request to a `Plan`: the worker's job, and what is made of its images.

`plan_request` chooses weights, sampling and size, within the work allowed (`draft`,
`sampling_choice`, `sizes`, `work`); decodes images and lays them out (`layout`, `conditions`), as
the operation's planner says (`operations`); and returns a `Plan` (`plan`).
"""
