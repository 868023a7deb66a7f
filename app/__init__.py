"""The pages: widgets and words, no mathematics."""
