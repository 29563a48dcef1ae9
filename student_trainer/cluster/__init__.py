"""Stages on a Ray cluster. Ray is imported here and in shared/cluster alone."""
