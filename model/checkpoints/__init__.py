"""The weights that Paella's authors published: which they are, how to get them, and how to make a bundle of them.

No module here imports torch unless its work is with tensors: `manifest` and `fetch` do not.
"""
