"""Pages and pictures of a plan, a profile or a benchmark: pure, data in and text out."""
