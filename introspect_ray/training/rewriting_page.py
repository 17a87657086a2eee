def render_rewriting(*a: object) -> str:
    return "<html></html>"
