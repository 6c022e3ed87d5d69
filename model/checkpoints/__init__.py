"""The weights that Paella's authors published: list, fetch and check them, make bundles of them.

No module here imports torch unless its work is with tensors: `manifest` and `fetch` do not.
"""
