"""Asking sites and reading their replies, round by round."""
