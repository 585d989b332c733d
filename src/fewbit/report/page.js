// Draws the charts that are to be seen, and shows the parts that belong to the chosen candidate.
const { specs, tops } = JSON.parse(document.getElementById("data").textContent);
const drawn = new Map();

// charts take their width from their place, so only what is shown can be drawn
async function draw() {
  for (const place of document.querySelectorAll("[data-chart]")) {
    if (!place.offsetParent || drawn.has(place)) continue;
    drawn.set(place, null);
    const options = { actions: false, renderer: "svg", ast: true, tooltip: { theme: "fewbit" } };
    const { view } = await window.vegaEmbed(place, specs[place.dataset.chart], options);
    drawn.set(place, view);
    if ("layers" in place.dataset) await setLayers(view);
  }
}

let candidate = 0;
let other = -1;

async function setLayers(view) {
  const top = Math.max(tops[candidate], other < 0 ? 0 : tops[other]);
  await view.signal("candidate", candidate).signal("other", other).signal("top", top).runAsync();
}

async function show() {
  for (const part of document.querySelectorAll("[data-inside]")) part.hidden = +part.dataset.inside !== candidate;
  for (const name of document.querySelectorAll("[data-of]")) name.hidden = +name.dataset.of !== candidate;
  const ticks = document.getElementById("ticks");
  if (ticks) {
    ticks.hidden = other < 0;
    if (other >= 0) ticks.querySelector("bdi").textContent = document.querySelector(`[data-of="${other}"]`).textContent;
  }
  for (const [place, view] of drawn) if (view && "layers" in place.dataset) await setLayers(view);
  await draw();
}

const choose = document.getElementById("choose");
if (choose) {
  choose.hidden = false;
  const selects = ["candidate", "other"].map((id) => document.getElementById(id));
  const changed = () => {
    [candidate, other] = selects.map((s) => +s.value);
    show();
  };
  for (const select of selects) select.addEventListener("change", changed);
  // a browser may restore the choice of an earlier visit
  [candidate, other] = selects.map((s) => +s.value);
}
await show();
document.documentElement.dataset.drawn = "yes";
