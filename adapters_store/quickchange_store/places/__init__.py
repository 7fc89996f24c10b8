"""Where a store's bytes lie: a folder, or objects under a URL."""
