"""diffusion-runtime: diffusers pipelines behind KServe."""

__version__ = "0.1.0"
