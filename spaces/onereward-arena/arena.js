// Zoom and pan of several images in step, the blend slider, keys to vote with, and how long an answer took.
// All by delegation from the document, since Gradio draws its elements anew.

// The theme is dark whatever the browser prefers. Gradio reads this from the address, before this script runs.
{
  const address = new URL(window.location);
  if (address.searchParams.get("__theme") !== "dark") {
    address.searchParams.set("__theme", "dark");
    window.location.replace(address);
  }
}

// Gradio's editor measures itself before the page has its width, and again only when that changes.
setInterval(() => {
  const canvas = document.querySelector("#editor canvas"), target = canvas?.parentElement;
  if (target && Math.abs(canvas.clientWidth - target.clientWidth) > 2)
    target.style.width = target.style.width ? "" : "calc(100% - 1px)";
}, 500);

(() => {
  const group = (element) => element.closest(".synchronised");
  const place = (box, zoom, x, y) => {
    zoom = Math.min(16, Math.max(1, zoom));
    const reach = (zoom - 1) / 2;
    x = Math.min(reach, Math.max(-reach, x));
    y = Math.min(reach, Math.max(-reach, y));
    Object.assign(box.dataset, { zoom, x, y });
    box.style.setProperty("--zoom", zoom);
    box.style.setProperty("--x", `${100 * x}%`);
    box.style.setProperty("--y", `${100 * y}%`);
  };
  const now = (box) => ["zoom", "x", "y"].map((name) => Number(box.dataset[name] ?? (name === "zoom" ? 1 : 0)));
  const zoomBy = (box, factor) => {
    const [zoom, x, y] = now(box);
    const to = Math.min(16, Math.max(1, zoom * factor));
    place(box, to, (x * to) / zoom, (y * to) / zoom);
  };

  document.addEventListener("wheel", (event) => {
    const view = event.target.closest?.(".view");
    if (!view || !(event.ctrlKey || event.shiftKey || now(group(view))[0] > 1 || event.target.closest(".zoomable"))) return;
    event.preventDefault();
    zoomBy(group(view), event.deltaY < 0 ? 1.15 : 1 / 1.15);
  }, { passive: false });

  let drag = null;
  document.addEventListener("pointerdown", (event) => {
    const view = event.target.closest?.(".view");
    if (!view || now(group(view))[0] === 1) return;
    drag = { view, at: [event.clientX, event.clientY] };
    view.classList.add("dragged");
    event.preventDefault();
  });
  document.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const box = group(drag.view), [zoom, x, y] = now(box), size = drag.view.getBoundingClientRect();
    place(box, zoom, x + (event.clientX - drag.at[0]) / size.width, y + (event.clientY - drag.at[1]) / size.height);
    drag.at = [event.clientX, event.clientY];
  });
  for (const end of ["pointerup", "pointercancel"])
    document.addEventListener(end, () => {
      drag?.view.classList.remove("dragged");
      drag = null;
    });

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("[data-zoom-by]");
    if (!button) return;
    const factor = Number(button.dataset.zoomBy);
    factor ? zoomBy(group(button), factor) : place(group(button), 1, 0, 0);
  });
  document.addEventListener("input", (event) => {
    const name = event.target.dataset?.sets;
    if (!name) return;
    const value = event.target.type === "checkbox" ? Number(event.target.checked) : event.target.value / 100;
    group(event.target).style.setProperty(name, value);
  });

  // Voting by keys, while the voting panel is on the screen and nobody is typing.
  const keys = {
    ArrowLeft: "answer-left", ArrowRight: "answer-right", ArrowDown: "answer-tie", x: "answer-neither",
    u: "undo", r: "answer-real", s: "answer-synthetic", 0: "answer-no-difference",
  };
  const onScreen = (id) => {
    const element = document.getElementById(id);
    const button = element?.matches("button") ? element : element?.querySelector("button");
    return button && button.offsetParent !== null && !button.disabled ? button : null;
  };
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (document.querySelector("[aria-modal=true]")) return;  // the list of the API lies over the question
    if (event.target.closest?.("input, textarea, select, [contenteditable], [role=slider], [role=tab], [role=radio]")) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const button = onScreen(keys[key] ?? (/^[1-9]$/.test(key) ? `number-${key}` : ""));
    if (!button) return;
    event.preventDefault();
    button.click();
  });

  // Whoever has clicked a tab or a checkbox goes on by keys; whoever came there by keys needs them there.
  document.addEventListener("click", (event) => {
    if (event.detail && event.target.closest?.("[role=tab], [type=checkbox]")) document.activeElement?.blur();
  });

  // Best and worst: the first number is the best image, the second one the worst. Kept here until both are chosen, so
  // that however fast they are pressed, none is taken for another.
  let best = null, choice = null;
  const mark = (worst = null) => {
    document.querySelectorAll("#pictures figure").forEach((figure) => {
      figure.classList.toggle("best", figure.id === `image-${best}`);
      figure.classList.toggle("worst", figure.id === `image-${worst}`);
    });
    const line = document.getElementById("choice");
    if (line) line.textContent = best === null ? line.dataset.unchosen : line.dataset.chosen.replace("{number}", best + 1);
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("#numbers button[id^=number-]");
    if (!button) return;
    const number = Number(button.id.slice("number-".length)) - 1;
    if (best === null || best === number) {
      best = best === null ? number : null;
      return mark();
    }
    choice = { best, worst: number };
    mark(number);
    best = null;
    document.getElementById("answer-best-worst").click();
  });
  window.arenaChoice = () => choice;

  // Gradio's editor calls all layers alike once a picture is open.
  const nameLayers = () => {
    const names = [...document.querySelectorAll(".legend span")].map((span) => span.textContent);
    document.querySelectorAll("#editor .layer-wrap li > button[aria-label^=layer-]").forEach((row, number) => {
      if (names[number] && row.textContent !== names[number]) row.textContent = names[number];
    });
    const title = document.querySelector("#editor .layer-title-button")?.firstChild;
    if (title?.data && title.data.trim() !== "Layers") title.data = "Layers ";
  };

  // The clock starts when a question is drawn; `arenaSeconds()` is how long it has been there.
  let shown = performance.now(), question;
  new MutationObserver(() => {
    const now = document.querySelector("#question [data-question]")?.dataset.question;
    if (now !== question) {
      [question, shown, best] = [now, performance.now(), null];
      mark();
    }
    nameLayers();
  }).observe(document, { childList: true, subtree: true, characterData: true, attributeFilter: ["data-question"] });
  window.arenaSeconds = () => Math.round(performance.now() - shown) / 1000;
})();
