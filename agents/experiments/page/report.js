"use strict";
// Draws the plots of report.html with plotly, and moves the gallery. All numbers are in the page's JSON.
const data = JSON.parse(document.getElementById("data").textContent);
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "x"];
const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
const byId = (id) => document.getElementById(id);
const axis = byId("axis"), source = byId("source"), group = byId("group"), frame = byId("frame");
const boxes = [...document.querySelectorAll("#agents input")];

const checked = () => new Set(boxes.filter((box) => box.checked).map((box) => box.value));
const shown = () => data.agents.filter((agent) => checked().has(agent.name));
const symbol = (agent) => SYMBOLS[data.agents.indexOf(agent) % SYMBOLS.length];

function layout(title, more) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const line = { gridcolor: colour("--line"), zerolinecolor: colour("--quiet"), linecolor: colour("--line"), automargin: true };
  return {
    title: { text: title, font: { size: 14 }, x: 0.5 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { color: colour("--text"), family: getComputedStyle(document.body).fontFamily },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--quiet"), activecolor: colour("--text") },
    margin: { l: 50, r: 20, t: 40, b: more.xaxis ? 45 : 30 }, hovermode: "closest",
    hoverlabel: { bgcolor: colour("--ground"), bordercolor: colour("--line"), font: { color: colour("--text") }, namelength: -1 },
    xaxis: { ...line, ...more.xaxis }, yaxis: { ...line, ...more.yaxis },
  };
}

// One panel a title, kept when they are the same: plotly then only redraws.
function draw(name, panels) {
  const place = document.querySelector(`[data-plots="${name}"]`);
  if (!place) return;
  const before = place.children.length;
  while (place.children.length > panels.length) place.lastChild.remove();
  while (place.children.length < panels.length) place.append(Object.assign(document.createElement("div"), { className: "plot" }));
  panels.forEach(({ title, traces, more }, i) => {  // all are in their place now, which gives them their width
    const plot = place.children[i];
    if (more.height) plot.style.height = `${more.height}px`;
    Plotly.react(plot, traces, layout(title, more), CONFIG);
    if (before && before !== panels.length) Plotly.Plots.resize(plot);
  });
}

function intervalPanels(values, titles) {
  return Object.entries(values).map(([name, of]) => {
    const agents = shown().filter((agent) => agent.name in of).reverse();
    const traces = agents.map((agent) => {
      const [mean, low, high] = of[agent.name];
      const ends = low === null ? "" : ` [${low.toFixed(3)}, ${high.toFixed(3)}]`;
      return {
        x: [mean], y: [agent.name], mode: "markers", name: agent.name, marker: { color: agent.colour, size: 10, symbol: symbol(agent) },
        error_x: { type: "data", symmetric: false, array: [(high ?? mean) - mean], arrayminus: [mean - (low ?? mean)], thickness: 2.5, width: 5 },
        hovertemplate: `${agent.name}: ${mean.toFixed(3)}${ends}<extra></extra>`,
      };
    });
    return { title: titles[name] ?? name, traces, more: { height: 85 + 26 * agents.length, yaxis: { type: "category" } } };
  });
}

function curvePanels(from, names, titles) {
  const x = axis.value, found = [];
  for (const name of names) {
    const traces = [];
    for (const agent of shown()) {
      const mean = agent.mean[from]?.[name];
      const several = agent.seeds.length > 1;
      for (const run of agent.seeds) {
        const curve = run.curves[from]?.[name];
        if (!curve || (!several && run.stopped === null)) continue;
        traces.push({
          x: curve[x], y: curve.y, mode: "lines", opacity: run.stopped === null ? 0.6 : 1,
          line: { color: agent.colour, width: 1.2, dash: run.stopped === null ? "solid" : "dash" },
          hovertemplate: `${agent.name}, seed ${run.seed}${run.stopped === null ? "" : ", stopped"}<br>%{x:.5~g}: %{y:.3f}<extra></extra>`,
        });
      }
      if (!mean) continue;
      const sparse = mean.y.length <= 30;
      traces.push({
        x: mean[x], y: mean.y, mode: sparse ? "lines+markers" : "lines", line: { color: agent.colour, width: 3 },
        marker: { symbol: symbol(agent), size: 8 },
        hovertemplate: `${agent.name}${several ? ", mean of seeds" : ""}<br>%{x:.5~g}: %{y:.3f}<extra></extra>`,
      });
    }
    const any = data.agents.some((agent) => agent.seeds.some((run) => run.curves[from]?.[name]));
    if (any) found.push({ title: titles[name] ?? name, traces, more: { xaxis: { title: { text: data.axes[x], font: { size: 12 } } } } });
  }
  return found;
}

function drawAll() {
  const agents = checked();
  draw("intervals", intervalPanels(data.intervals, data.metrics));
  draw("repaired", intervalPanels(data.repaired, {}));
  if (axis) {
    draw("curves", curvePanels(source.value, Object.keys(data.metrics), data.metrics));
    draw("repair", curvePanels("repair", data.families, {}));
  }
  for (const tile of document.querySelectorAll("[data-agent]")) tile.classList.toggle("hidden", !agents.has(tile.dataset.agent));
}

// The gallery -------------------------------------------------------------------------------------------------------

function show(at) {
  const gallery = byId("gallery"), last = Number(frame.max);
  frame.value = at;
  gallery.style.setProperty("--at", at);
  gallery.classList.toggle("growing", at < last);
  byId("frame-name").textContent = names[at];
}

let names = [];
if (frame) {
  const longest = [...document.querySelectorAll(".strip .names:first-of-type")].map((row) => [...row.children].map((name) => name.textContent));
  names = longest.reduce((one, other) => (other.length > one.length ? other : one), []);
  const gallery = byId("gallery");
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; };
  frame.addEventListener("input", () => { stop(); show(Number(frame.value)); });
  byId("play").addEventListener("click", () => {
    stop();
    show(0);
    timer = setInterval(() => {
      const at = Number(frame.value) + 1;
      show(at);
      if (at >= Number(frame.max)) stop();
    }, 500);
  });
  byId("boxes").addEventListener("change", (event) => gallery.classList.toggle("no-boxes", !event.target.checked));
  byId("masks")?.addEventListener("change", (event) => gallery.classList.toggle("with-masks", event.target.checked));
  for (const growth of document.querySelectorAll(".growth")) {
    growth.addEventListener("toggle", () => {  // the strips are the tiles' own images, which the page holds once
      for (const strip of growth.querySelectorAll(".strip")) {
        const image = strip.querySelector("img");
        image.src = [...growth.parentElement.querySelectorAll(".tile")].find((tile) => tile.dataset.agent === strip.dataset.agent).querySelector("img").src;
        image.hidden = false;
      }
    });
  }
}

// -------------------------------------------------------------------------------------------------------------------

if (source) {  // without two evaluations while training there is no held-out curve
  const long = data.agents.some((agent) => agent.seeds.some((run) => (run.curves.eval?.reward?.y.length ?? 0) > 1));
  source.value = long ? "eval" : "rollout";
}
for (const control of [axis, source, ...boxes]) control?.addEventListener("change", drawAll);
group?.addEventListener("change", () => {
  const chosen = group.value ? Object.values(data.groups[group.value]) : null;
  for (const box of boxes) box.checked = !chosen || box.value === "base" || chosen.includes(box.value);
  drawAll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
