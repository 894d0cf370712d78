"""What skyreels-mini can do and what a cache schedule does to it, measured on held-out scenes."""
