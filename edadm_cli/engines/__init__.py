"""Runs exported denoisers on engines, and compares engines with exact integer arithmetic."""
