"""Where other libraries meet exported pipelines."""
