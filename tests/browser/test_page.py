"""The page, used as people use it: what it shows is what the API says, and nothing of it is lost on the way."""

import numpy as np
import pytest
from page_server import TEXTS, page_server, simulated_of, tokens_of, vector_of

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=20_000)

DUTCH = 8
"""Token of the first text that a first visit explains."""


@pytest.fixture(scope="module")
def running():
    with page_server() as server:
        yield server


@pytest.fixture
def server(running):
    running.reset()
    return running


def said(page):
    return page.locator("#explanation blockquote")


def sentence(page):
    return page.get_by_role("textbox", name="Sentence", exact=True)


def cell(page, layer, token):
    return page.locator("[role=grid] tbody tr").nth(layer).locator("td").nth(token)


def bodies(server, path):
    return [body for found, body in server.requests if found == f"/v1/{path}"]


def opened(new_page, server, address="", **kind):
    page = new_page(**kind)
    page.goto(server.url + address)
    return page


def visited(new_page, server, **kind):
    """A first visit, when everything is there that it shows."""
    page = opened(new_page, server, **kind)
    expect(said(page)).to_have_text("the word Dutch at layer 1")
    expect(page.locator("ol.heat li").first).to_be_visible()
    return page


def test_a_cell_is_explained_piece_by_piece_and_its_numbers_are_the_servers(new_page, server):
    page = visited(new_page, server)
    norms = [
        [float(text) for text in row.locator("td").all_inner_texts()] for row in page.locator("tbody tr").all()[2:]
    ]
    tokens = tokens_of(TEXTS[0])
    expected = [[np.linalg.norm(vector_of(token, layer)) for token in tokens] for layer in (2, 3)]
    np.testing.assert_allclose(norms, expected, atol=0.006)

    server.faults.held_after = 3
    cell(page, 2, 4).click()
    expect(said(page)).to_have_text("the word by")
    expect(said(page)).to_have_attribute("aria-busy", "true")
    server.faults.held_after = None
    expect(said(page)).to_have_text("the word by at layer 2")
    expect(said(page)).to_have_attribute("aria-busy", "false")
    expect(cell(page, 2, 4)).to_have_text("the word by at layer 2")
    expect(cell(page, 2, 4)).to_have_attribute("aria-selected", "true")
    item = {"kind": "token", "text": TEXTS[0], "layer": 2, "position": 4}
    asked = {"explainer": "features", "items": [item], "max_new_tokens": None}
    assert bodies(server, "explain/stream")[-1] == asked


def test_heat_shows_simulated_levels_and_projections_on_the_clicked_vector(new_page, server):
    page = visited(new_page, server)
    expect(page.locator("ol.heat li")).to_have_count(len(tokens_of(TEXTS[0])) - 1)
    tokens = tokens_of(TEXTS[0])
    vectors = np.array([vector_of(token, 1) for token in tokens])
    true = np.maximum(vectors @ vectors[DUTCH] / np.linalg.norm(vectors[DUTCH]), 0)[1:]
    simulated = np.array(simulated_of("the word Dutch at layer 1", tokens[1:]))
    shown = {
        kind: [float(level.get_attribute("title").split(": ")[1]) for level in page.locator(f".level.{kind}").all()]
        for kind in ("simulated", "true")
    }
    np.testing.assert_allclose(shown["simulated"], simulated)
    np.testing.assert_allclose(shown["true"], true, rtol=1e-5)
    expect(page.locator(".correlation b")).to_have_text(f"{np.corrcoef(simulated, true)[0, 1]:.2f}")

    page.get_by_label("Description").fill("the word Siroun")
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator("ol.heat li", has_text="Siroun").locator(".simulated")).to_have_attribute(
        "title", "simulated: 10"
    )
    mine = np.array(simulated_of("the word Siroun", tokens[1:]))
    expect(page.locator(".correlation b")).to_have_text(f"{np.corrcoef(mine, true)[0, 1]:.2f}")
    page.get_by_role("button", name="Back to the explainer's").click()
    expect(page.get_by_label("Description")).to_have_value("the word Dutch at layer 1")

    page.goto(server.url + "#text=one+Two")
    page.get_by_label("Description").fill("the word one")
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator(".level")).to_have_text(["simulated 10.0", "simulated 2.0"])
    item = {"description": "the word one", "text": "one Two"}
    assert bodies(server, "simulate") == [{"simulator": "simulator", "items": [item]}], "of no vector nothing is true"


def test_a_whole_layer_is_explained_in_batches_and_a_failure_stays_in_its_cell(new_page, server):
    page = visited(new_page, server)
    page.get_by_role("button", name="L1: explain every token").click()
    expect(cell(page, 1, 9)).to_have_text("the word . at layer 1")
    expect(cell(page, 1, 0)).to_have_text("failed")
    assert "the first token has no words" in cell(page, 1, 0).get_attribute("title")
    positions = [[item["position"] for item in body["items"]] for body in bodies(server, "explain")]
    assert positions == [[0, 1, 2, 3, 4, 5, 6, 7], [9]], "what is known already is not asked again"
    page.get_by_role("button", name="L1: explain every token").click()
    expect(page.locator("#grid .loading")).to_have_count(0)
    assert [item["position"] for item in bodies(server, "explain")[-1]["items"]] == [0]


def test_a_latent_is_explained_and_scored_against_its_own_activations(new_page, server):
    page = visited(new_page, server)
    page.get_by_label("Latent", exact=True).fill("7")
    page.locator("form.latent").get_by_role("button", name="Explain").click()
    expect(said(page)).to_have_text("latent 7 at layer 1")
    expect(page.locator(".level.true[title='true: 1']")).to_have_count(1)
    item = {"description": "latent 7 at layer 1", "text": TEXTS[0], "coder": "sae", "latent": 7}
    assert bodies(server, "score")[-1] == {"simulator": "simulator", "items": [item]}

    page.goto(server.url + "#coder=sae&latent=99")
    expect(page.locator("#explanation .failed span")).to_have_text("sae has 16 latents, found 99 (items.0.latent)")


def test_a_patch_shows_prediction_beside_truth(new_page, server, save):
    page = visited(new_page, server)
    panel = page.locator("#what-if")
    panel.get_by_label("of sentence").fill(TEXTS[2])
    panel.get_by_label("of sentence").blur()
    source = panel.get_by_role("listbox", name="Token whose vector replaces it")
    expect(source.get_by_role("option")).to_have_count(len(tokens_of(TEXTS[2])))
    source.get_by_role("option", name="Stubri").click()
    panel.get_by_role("listbox", name="Token to replace").get_by_role("option", name="Siroun").click()
    panel.get_by_label("First layer").select_option("1")
    panel.get_by_label("Last layer").select_option("2")
    panel.get_by_role("button", name="Predict and run").click()
    expect(panel.locator(".outcome dd b")).to_have_text(["German", "Dutch", "Dutch"])
    expect(panel.locator(".outcome .prediction")).to_contain_text("changes to")
    expect(panel.locator(".outcome > p")).to_have_class("right")
    change = {"kind": "patch", "position": 6, "source_text": TEXTS[2], "source_position": 6, "layers": [1, 2]}
    assert bodies(server, "what_if") == [{"explainer": "changes", "text": TEXTS[0], **change}]
    save(page, "patch")


def test_a_span_is_dropped_by_its_first_and_last_token(new_page, server, save):
    page = visited(new_page, server)
    page.get_by_role("group", name="Example sentences").get_by_role("button", name="What kind").click()
    panel = page.locator("#what-if")
    panel.get_by_role("button", name="Drop a span").click()
    tokens = panel.get_by_role("listbox", name="Span to drop").get_by_role("option")
    expect(tokens).to_have_count(len(tokens_of(TEXTS[1])))
    first = next(token.index for token in tokens_of(TEXTS[1]) if token.text == "Hint")
    tokens.nth(first).click()
    tokens.nth(first + 2).click()
    expect(panel.locator(".strip [aria-selected=true]")).to_have_text(["Hint", ":", "camera"])
    panel.get_by_role("button", name="Predict and run").click()
    expect(panel.locator(".outcome dd b")).to_have_text(["German", "phone", "German"])
    expect(panel.locator(".outcome > p")).to_have_class("wrong")
    [asked] = bodies(server, "what_if")
    assert asked["explainer"] == "hints"
    assert TEXTS[1][slice(*asked["span"])] == "Hint: camera"
    save(page, "drop")

    panel.get_by_role("button", name="Patch a token").click()
    panel.get_by_role("group", name="Example changes").get_by_role("button").click()
    expect(panel.locator(".outcome > p")).to_have_class("right")
    assert bodies(server, "what_if")[-1]["explainer"] == "changes", "each kind of change has its own explainer"
    expect(page.locator(".waiting")).to_be_empty()


def test_a_link_and_the_history_bring_a_view_back(new_page, server):
    page = visited(new_page, server)
    page.get_by_role("group", name="Example changes").get_by_role("button").click()
    expect(page.locator(".outcome > p")).to_have_class("right")
    cell(page, 0, 5).click()
    expect(said(page)).to_have_text("the word Lusha at layer 0")
    page.get_by_label("Description").fill("the word Stubri")
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator("ol.heat li", has_text="Stubri").locator(".simulated")).to_have_attribute(
        "title", "simulated: 10"
    )

    other = opened(new_page, server, page.url.removeprefix(server.url))
    expect(other.locator(".outcome > p")).to_have_class("right")
    for place in ("#explanation", "#heat", "#what-if", "#grid"):
        expect(other.locator(place)).to_have_text(page.locator(place).inner_text(), use_inner_text=True)
    expect(other.get_by_label("Description")).to_have_value("the word Stubri")
    expect(sentence(other)).to_have_value(TEXTS[2])

    page.reload()
    entries = page.locator("#history a b")
    expect(entries).to_have_text(["German → Dutch", "the word Lusha at layer 0", "the word Dutch at layer 1"])
    entries.last.click()
    expect(said(page)).to_have_text("the word Dutch at layer 1")
    expect(sentence(page)).to_have_value(TEXTS[0])
    page.go_back()
    expect(said(page)).to_have_text("the word Lusha at layer 0")
    page.locator("#history").get_by_role("button", name="Clear").click()
    expect(page.locator("#history")).to_have_count(0)


def test_a_token_is_asked_for_and_what_waited_for_it_goes_on(new_page, server):
    server.reset(token="correct token of 24 chars")
    page = opened(new_page, server)
    form = page.locator("form.token")
    expect(form).to_contain_text("This server asks for a token.")
    form.get_by_label("Token").fill("wrong")
    form.get_by_role("button").click()
    expect(form).to_contain_text("The server does not accept this token.")
    form.get_by_label("Token").fill("correct token of 24 chars")
    form.get_by_role("button").click()
    expect(said(page)).to_have_text("the word Dutch at layer 1")
    expect(form).to_have_count(0)
    assert "correct" not in page.url
    assert page.evaluate("localStorage.length") == 0


def test_a_busy_server_is_asked_again_after_the_time_that_it_names(new_page, server):
    page = visited(new_page, server)
    before = len(server.requests)
    server.faults.busy = 100
    cell(page, 1, 6).click()
    expect(page.locator(".waiting")).to_have_text("The server is busy; trying again in 1 s.")
    server.faults.busy = 0
    expect(said(page)).to_have_text("the word Siroun at layer 1")
    expect(page.locator(".waiting")).to_be_empty()
    asked = [body for path, body in server.requests[before:] if path == "/v1/explain/stream"]
    assert len(asked) >= 2
    assert asked.count(asked[0]) == len(asked)


def test_what_was_lost_on_its_way_is_sent_again(new_page, server):
    page = visited(new_page, server)
    lost = [
        lambda route: route.abort("connectionreset"),
        lambda route: route.fulfill(status=502, body="Bad Gateway"),
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=""),
    ]
    tried = []

    def lose(route):
        tried.append(route.request.post_data)
        (lost.pop(0) if lost else lambda route: route.continue_())(route)

    page.route("**/v1/explain/stream", lose)
    cell(page, 0, 3).click()
    expect(page.locator(".waiting")).to_have_text("The server cannot be reached; trying again in 1 s.")
    expect(said(page)).to_have_text("the word spoken at layer 0", timeout=15_000)
    assert len(tried) == 4 and len(set(tried)) == 1
    expect(page.locator(".waiting")).to_be_empty()


def test_what_takes_too_long_is_sent_again_once(new_page, server):
    page = visited(new_page, server)
    tried = []

    def late(route):
        tried.append(route.request.post_data)
        route.fulfill(status=503, json={"error": {"code": "timeout", "message": "no answer within 60 s"}})

    page.route("**/v1/explain/stream", late)
    cell(page, 0, 3).click()
    expect(page.locator("#explanation .failed span")).to_have_text("no answer within 60 s", timeout=15_000)
    assert len(tried) == 2


def test_failures_are_one_line_and_can_be_tried_again(new_page, server):
    page = visited(new_page, server)
    server.faults.break_stream = True
    cell(page, 0, 3).click()
    failure = page.locator("#explanation .failed span")
    expect(failure).to_have_text("The explanation broke off.")
    server.faults.break_stream = False
    page.get_by_role("button", name="Try again").click()
    expect(said(page)).to_have_text("the word spoken at layer 0")

    page.context.set_offline(True)
    cell(page, 0, 4).click()
    expect(failure).to_have_text("The server cannot be reached.", timeout=20_000)
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(said(page)).to_have_text("the word by at layer 0")

    page.goto(server.url + "#text=one+two&layer=1&token=77")
    expect(failure).to_have_text("the text has 3 tokens, found 77 (items.0.position)")
    page.goto(server.url + "#text=one+two&explainer=gone&simulator=simulator")
    expect(page.locator(".waiting")).to_have_text("This server does not have gone; another model answers.")


def test_the_keyboard_is_enough(new_page, server):
    page = visited(new_page, server)
    sentence(page).focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("one Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("three")
    page.keyboard.press("Enter")
    expect(page.locator("thead th")).to_have_text(["⟨begin⟩", "one", "Two", "⏎", "three"])

    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('role')") == "gridcell":
            break
    for key in ("PageUp", "Home", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
    expect(cell(page, 1, 2)).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert bodies(server, "explain/stream")[-1]["items"][0]["position"] == DUTCH, "arrows alone ask nothing"
    page.keyboard.press("Enter")
    expect(said(page)).to_have_text("the word Two at layer 1")

    page.get_by_role("button", name="Drop a span").focus()
    page.keyboard.press("Enter")
    page.get_by_role("listbox", name="Span to drop").get_by_role("option").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator(".strip [aria-selected=true]")).to_have_text(["one", "Two"])


def test_it_fits_phones_and_wide_screens_in_light_and_dark(new_page, server, save):
    page = visited(new_page, server, width=400)
    page.get_by_role("group", name="Example changes").get_by_role("button").click()
    expect(page.locator(".outcome > p")).to_have_class("right")
    cell(page, 1, 6).click()
    expect(page.locator("ol.heat li").first).to_be_visible()
    shows_chosen_cell = (
        "(() => { const box = document.querySelector('td[aria-selected=true]').getBoundingClientRect();"
        " return box.left >= 0 && box.right <= innerWidth })()"
    )
    for width, scheme in ((400, "light"), (400, "dark"), (1600, "light"), (1600, "dark")):
        page.set_viewport_size({"width": width, "height": 1000})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == width, "only the grid scrolls sideways"
        assert page.evaluate(shows_chosen_cell)
        beside = page.locator("#explanation").bounding_box()["y"] < page.locator("#grid").bounding_box()["y"]
        assert beside == (width == 1600)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(")
        assert (int(background.split(",")[0]) < 60) == (scheme == "dark")
        save(page, f"page-{width}-{scheme}")


def test_a_long_text_is_shown_in_parts(new_page, server):
    page = visited(new_page, server)
    sentence(page).fill("and Once " * 700)
    page.get_by_role("button", name="Read").click()
    expect(page.locator(".pager")).to_contain_text("tokens 0 to 999 of 1402")
    cell(page, 2, 999).focus()
    page.keyboard.press("ArrowRight")
    expect(cell(page, 2, 0)).to_be_focused()
    expect(page.locator(".pager")).to_contain_text("tokens 1000 to 1401 of 1402")
    page.keyboard.press("Enter")
    expect(said(page)).to_have_text("the word Once at layer 2")
    page.get_by_role("button", name="Earlier tokens").click()
    expect(cell(page, 0, 999)).to_have_count(1)


def test_text_never_becomes_markup(new_page, server):
    page = visited(new_page, server)
    sentence(page).fill("<img src=x onerror=alert(1)> <b>bold</b>")
    page.get_by_role("button", name="Read").click()
    expect(page.locator("thead th").nth(1)).to_have_text("<")
    cell(page, 1, 2).click()
    expect(said(page)).to_have_text("the word img at layer 1")
    assert page.locator("img").count() == 0
