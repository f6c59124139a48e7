"""Live views: each has its Python side here and its TypeScript in `widgets/` at the top."""
