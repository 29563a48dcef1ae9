"""Asking a black-box teacher: as fast as it allows, nothing lost, nothing paid twice."""
