"""Connects exported pipelines with other libraries: diffusers, PEFT and ComfyUI."""
