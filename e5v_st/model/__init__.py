"""What travels with a saved model: flat files that import each other and nothing else of this package."""
