"""How the Space looks: a dark theme for reading images by. The details are in arena.css."""

import gradio as gr


_DARK = {
    "body_background_fill": "#0d1217",
    "body_text_color": "#e3e9ef",
    "body_text_color_subdued": "#a9b5c1",
    "background_fill_primary": "#131a21",
    "background_fill_secondary": "#10161c",
    "block_background_fill": "#131a21",
    "block_border_color": "#28323c",
    "block_label_background_fill": "#1c242d",
    "block_label_text_color": "#c3ccd6",
    "block_title_text_color": "#dfe6ee",
    "block_info_text_color": "#a9b5c1",
    "border_color_primary": "#313c47",
    "input_background_fill": "#0f151b",
    "input_border_color": "#3d4957",
    "input_placeholder_color": "#8b98a6",
    "button_primary_background_fill": "#2f6f93",
    "button_primary_background_fill_hover": "#3a83ac",
    "button_primary_text_color": "#ffffff",
    "button_secondary_background_fill": "#222c36",
    "button_secondary_background_fill_hover": "#2d3945",
    "button_secondary_text_color": "#e3e9ef",
    "checkbox_label_background_fill": "#1c242d",
    "checkbox_label_background_fill_selected": "#2f6f93",
    "checkbox_label_text_color": "#e3e9ef",
    "checkbox_label_text_color_selected": "#ffffff",
    "checkbox_background_color": "#0f151b",
    "table_even_background_fill": "#131a21",
    "table_odd_background_fill": "#10161c",
    "panel_background_fill": "#10161c",
    "link_text_color": "#8cc6e8",
}


def theme() -> gr.themes.Base:
    """The same dark colours whether the browser asks for a light page or a dark one; fonts of the machine."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    base = gr.themes.Base(primary_hue="sky", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"])
    known = set(vars(base))
    both = {**_DARK, **{f"{name}_dark": value for name, value in _DARK.items() if f"{name}_dark" in known}}
    return base.set(**both)
