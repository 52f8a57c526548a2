"""Images from an export."""
