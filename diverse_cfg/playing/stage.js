// The takes, their map and what was kept: draws `props.value`, plays, and tells the server what was clicked.
// Texts from outside are only ever set as text.
const build = (tag, attributes = {}, ...children) => {
  const svg = ["svg", "circle", "line", "text", "g", "path", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};
const audio = build("audio", { preload: "auto" });
const status = build("div", { class: "status", role: "status" });
const groups = build("div", { class: "groups" });
const side = build("div", { class: "side" });
element.replaceChildren(audio, status, build("div", { class: "board" }, groups, side));

let pointed; // the pause before a dot that is pointed at plays
let current = null; // id of the take that plays or has played last
let takes = new Map(); // id → take
const cards = new Map(); // id → its card, kept over updates so that focus stays
const clock = seconds => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

const play = (id, from = 0) => {
  const take = takes.get(id);
  if (!take) return;
  if (current !== id) {
    audio.src = take.url;
    audio.volume = take.volume;
    current = id;
  }
  audio.currentTime = from;
  audio.play().catch(() => {}); // before the first click a browser stays silent
  paint();
};
const toggle = id => (current === id && !audio.paused ? audio.pause() : play(id, current === id && !audio.ended ? audio.currentTime : 0));

const paint = () => {
  for (const node of element.querySelectorAll("[data-id]")) {
    const mine = node.dataset.id === current;
    node.classList.toggle("playing", mine && !audio.paused);
    if (!node.matches(".card")) continue;
    const button = node.querySelector(".play");
    button.textContent = mine && !audio.paused ? "❚❚" : "▶";
    button.setAttribute("aria-label", `${mine && !audio.paused ? "Pause" : "Play"} ${node.getAttribute("aria-label")}`);
    const share = mine ? audio.currentTime / takes.get(node.dataset.id).seconds : 0;
    node.style.setProperty("--at", `${Math.min(100, 100 * share)}%`);
  }
};
const follow = () => {
  paint();
  if (!audio.paused) requestAnimationFrame(follow);
};
audio.addEventListener("play", follow);
for (const event of ["pause", "ended", "seeked"]) audio.addEventListener(event, paint);

const outline = peaks => {
  const bars = peaks.map((peak, at) => `M${at + 0.5} ${50 - Math.max(1, peak / 2)}V${50 + Math.max(1, peak / 2)}`);
  const box = { viewBox: `0 0 ${peaks.length} 100`, preserveAspectRatio: "none", class: "wave", "aria-hidden": "true" };
  return build("svg", box, build("path", { d: bars.join("") }));
};

const card = take => {
  const name = `take ${take.number}, seed ${take.seed}, ${take.model}`;
  const seek = event => {
    const box = event.currentTarget.getBoundingClientRect();
    play(take.id, (take.seconds * (event.clientX - box.left)) / box.width);
  };
  const button = (label, title, event, extra = {}) =>
    build("button", { type: "button", title, onclick: () => trigger(event, { id: take.id }), ...extra }, label);
  const copy = event => {
    navigator.clipboard?.writeText(String(take.seed));
    event.target.textContent = "copied";
    setTimeout(() => (event.target.textContent = `seed ${take.seed}`), 900);
  };
  const node = build("article", { class: "card", tabindex: "0", "data-id": take.id, "aria-label": name });
  const picture = build("div", { class: "picture", onclick: seek }, build("img", { src: take.image, alt: "" }));
  picture.append(outline(take.peaks), build("i", { class: "head" }));
  const keep = button("", "", "keep", { class: "keep" });
  const row = build(
    "div", { class: "line" },
    build("button", { class: "play", type: "button", onclick: () => toggle(take.id) }, "▶"),
    build("span", { class: "name" }, build("b", {}, take.label),
      build("button", { class: "seed", type: "button", title: "Copy the seed", onclick: copy }, `seed ${take.seed}`)),
    build("span", { class: "time" }, clock(take.seconds)),
  );
  const actions = build("div", { class: "actions" }, keep);
  if (take.extendable) {
    actions.append(
      button("extend", "Go on where it ends", "longer"),
      button("similar", "More like this, but different: new takes that begin like this one and go on differently", "like"),
    );
  }
  actions.append(build("a", { href: take.url, download: take.file, title: "A WAV file with its settings in it" }, "WAV"));
  node.append(picture, row, actions);
  return node;
};

const grid = list => {
  const box = build("div", { class: "cards" });
  for (const take of list) {
    if (!cards.has(take.id)) cards.set(take.id, card(take));
    const node = cards.get(take.id);
    const keep = node.querySelector(".keep");
    keep.textContent = take.kept ? "★ kept" : "☆ keep";
    keep.title = take.kept ? "It lies in the folder of kept takes" : "Put it into the folder of kept takes";
    keep.disabled = take.kept;
    keep.hidden = !props.value.keeps;
    box.append(node);
  }
  return box;
};

const drawMap = (value, colours) => {
  const points = value.map;
  if (points.length < 2) return [];
  const reach = Math.max(0.05, ...points.flatMap(p => [Math.abs(p.x), Math.abs(p.y)])) * 1.12;
  const size = 300, half = size / 2, place = at => half + (at / reach) * half;
  const bar = [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01].find(d => (Math.sqrt(2 * d) / reach) * half < size * 0.4) ?? 0.01;
  const length = (Math.sqrt(2 * bar) / reach) * half;
  const drawing = build("svg", { viewBox: `0 0 ${size} ${size + 22}`, role: "group", "aria-label": "Map of the takes" });
  for (const at of [0.25, 0.5, 0.75]) {
    drawing.append(build("line", { x1: at * size, x2: at * size, y1: 0, y2: size, class: "rule" }));
    drawing.append(build("line", { y1: at * size, y2: at * size, x1: 0, x2: size, class: "rule" }));
  }
  for (const point of points) {
    const take = takes.get(point.id);
    if (!take) continue;
    const label = `take ${take.number}, ${take.model}, “${take.prompt}”`;
    const dot = build("g", {
      class: `dot ${colours[point.group] ?? "earlier"}`, "data-id": point.id, tabindex: "0", role: "button", "aria-label": `Play ${label}`,
      onmouseenter: () => (pointed = setTimeout(play, 80, point.id)), onmouseleave: () => clearTimeout(pointed),
      onfocus: event => event.target.matches(":focus-visible") && play(point.id),
      onclick: () => play(point.id),
    }, build("circle", { cx: place(point.x), cy: place(-point.y), r: point.group in colours ? 11 : 6 }), build("title", {}, label));
    if (point.group in colours) dot.append(build("text", { x: place(point.x), y: place(-point.y) + 4 }, take.label.replace(/\D+/g, "") || "·"));
    drawing.append(dot);
  }
  drawing.append(build("line", { x1: 4, x2: 4 + length, y1: size + 10, y2: size + 10, class: "bar" }));
  drawing.append(build("text", { x: 10 + length, y: size + 14, class: "unit" }, `distance ${bar}`));
  return [
    build("h3", {}, "Map of the takes"),
    drawing,
    build("p", { class: "hint" }, `Near dots sound alike to the ${value.encoder}; point at one to hear it. Pale dots are earlier takes.`),
  ];
};

const text = build("span");
const stop = build("button", { type: "button", class: "stop", hidden: "", onclick: () => trigger("stop") }, "Stop");
status.append(text, stop);
const tell = ({ text: line, fraction, busy, wrong }) => {
  if (busy && stop.hidden && status.getBoundingClientRect().top > innerHeight * 0.8) status.scrollIntoView({ behavior: "smooth" });
  text.textContent = line;
  stop.hidden = !busy;
  status.classList.toggle("wrong", wrong);
  element.classList.toggle("busy", busy);
  status.style.setProperty("--done", `${100 * fraction}%`);
};
addEventListener("told", event => tell(event.detail));
addEventListener("asked", () => tell({ text: "Waiting for the model…", fraction: 0, busy: true, wrong: false }));

const draw = () => {
  const value = props.value ?? {};
  if (!value.groups) return;
  const focused = document.activeElement?.closest?.("[data-id]")?.dataset.id;
  const inside = element.contains(document.activeElement) ? document.activeElement : null;
  takes = new Map([...value.groups.flatMap(group => group.takes), ...value.kept].map(take => [take.id, take]));

  const newest = value.groups.filter(group => group.batch === value.batch);
  const colours = Object.fromEntries(newest.map(group => [group.id, group.guided ? "guided" : "now"]));
  const section = group => {
    const head = build("header", {}, build("h3", {}, group.title), build("span", { class: "note" }, group.note));
    if (group.comparable) {
      const title = "The same prompt and seeds, played by the base with guidance: what the student learnt from";
      head.append(build("button", { type: "button", class: "compare", title, onclick: () => trigger("guided", { group: group.id }) }, "compare with the guided base"));
    }
    return build("section", { class: group.guided ? "group guided" : "group" }, head, grid(group.takes));
  };
  groups.replaceChildren(...newest.map(section));
  if (!newest.length) groups.append(build("p", { class: "empty" }, "Type what you want to hear, and make takes."));
  const earlier = value.groups.filter(group => group.batch !== value.batch).reverse();
  for (const group of earlier) {
    const open = openEarlier.has(group.id) ? { open: "" } : {};
    const fold = build("details", { ...open, ontoggle: event => openEarlier[event.target.open ? "add" : "delete"](group.id) });
    fold.append(build("summary", {}, build("b", {}, `Earlier: ${group.title}`), build("span", { class: "note" }, ` ${group.note}`)), grid(group.takes));
    groups.append(fold);
  }
  side.replaceChildren(...drawMap(value, colours));
  if (value.keeps) {
    side.append(build("h3", {}, "Kept"));
    const elsewhere = value.kept.filter(take => !value.groups.some(group => group.takes.some(other => other.id === take.id)));
    side.append(value.kept.length ? build("p", { class: "hint" }, `${value.kept.length} in ${value.keeps}`) : build("p", { class: "hint" }, `What you keep goes to ${value.keeps}.`));
    side.append(grid(elsewhere.reverse()));
  }
  for (const id of cards.keys()) if (!takes.has(id)) cards.delete(id);
  if (inside?.isConnected) inside.focus({ preventScroll: true });
  else if (focused) element.querySelector(`[data-id="${focused}"]`)?.focus({ preventScroll: true });
  paint();
};
const openEarlier = new Set();

// Space plays, arrows go to the next card (and the one below), k keeps.
element.addEventListener("keydown", event => {
  const here = event.target.closest(".card");
  if (!here || event.target !== here || event.ctrlKey || event.metaKey || event.altKey) return;
  const all = [...element.querySelectorAll(".card")].filter(node => node.offsetParent);
  const columns = all.filter(node => node.offsetTop === all[0].offsetTop).length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (step) all[all.indexOf(here) + step]?.focus();
  else if (event.key === " " || event.key === "Enter") toggle(here.dataset.id);
  else if (event.key === "k") here.querySelector(".keep:not(:disabled)")?.click();
  else return;
  event.preventDefault();
});
watch("value", draw);
draw();
