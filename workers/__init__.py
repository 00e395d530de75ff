"""What is deployed: one thin entry point per role."""
