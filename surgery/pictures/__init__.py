"""Pictures of what was measured, as SVG and HTML that need nothing else. Pure: data in, text out."""
