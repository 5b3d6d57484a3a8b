"""Train Stable Diffusion from scratch: the library under the workflow's scripts."""
