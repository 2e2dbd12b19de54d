"""Prompts to videos or pictures with diffusers pipelines, every sampling step recorded when asked for."""

from halfstep.generate.batch import GenerateReport, generate
from halfstep.generate.config import GenerateConfig
from halfstep.generate.template import expand_template

__all__ = ["GenerateConfig", "GenerateReport", "expand_template", "generate"]
