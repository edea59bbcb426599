"""Measuring what a model does: how well pictures keep the person, the pose and the prompt, with confidence intervals."""
