"""Measuring reuse on a model: how far answers move, under which donor relation, at what cost."""
