// The page of whoever looks after the box: asks the gateway once a second and shows what it says.

import { draw } from "./history.js";
import { choose, fill, text } from "./texts.js";

const by = (id) => document.getElementById(id);
const fragment = new URLSearchParams(location.hash.slice(1));
if (fragment.get("token")) {
  localStorage.setItem("watch-token", fragment.get("token"));
  history.replaceState(null, "", location.pathname);
}
choose(localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en"));
fill(document);

by("token").addEventListener("change", () => {
  localStorage.setItem("watch-token", by("token").value.trim());
  look();
});

async function look() {
  let response;
  try {
    const token = localStorage.getItem("watch-token") ?? localStorage.getItem("token");
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    response = await fetch("board", { headers, signal: AbortSignal.timeout(5000) });
  } catch {
    return state("off");
  }
  const refused = response.status === 401 || response.status === 403;
  by("notice").hidden = !refused;
  if (refused) by("notice-text").textContent = text("watch-needed");
  if (!response.ok) return state("off");
  state("on");
  show(await response.json());
}

function state(name) {
  by("gateway-state").dataset.state = name;
  by("gateway-state").textContent = text(`gateway-${name}`);
  if (name !== "on") by("broker-state").dataset.state = "unknown";
}

function show(board) {
  by("device").textContent = board.meta.model ? `edge-asr ${board.meta.version}` : "edge-asr";
  by("broker-state").dataset.state = board.broker;
  by("broker-state").textContent = text(`broker-${board.broker}`);
  figures(board);
  sources(board.sources);
  sessions(board.sessions);
  alarms(board.alarms);
  said(board.said);
  about(board);
}

function figures(board) {
  const waiting = board.outbox ? Object.values(board.outbox.waiting).reduce((sum, count) => sum + count, 0) : null;
  const dropped = board.outbox ? Object.values(board.outbox.dropped).reduce((sum, count) => sum + count, 0) : null;
  const number = (value, digits = 0, unit = "") =>
    value === null || value === undefined ? "–" : `${value.toFixed(digits)}${unit && ` ${unit}`}`;
  const shown = [
    ["figure-waiting", number(waiting), waiting > 100],
    ["figure-oldest", number(board.outbox?.oldest_age_s, 0, "s"), (board.outbox?.oldest_age_s ?? 0) > 60],
    ["figure-dropped", number(dropped), dropped > 0],
    ["figure-finals", number(board.finals_waiting), board.finals_waiting > 4],
    ["figure-rtf", number(board.real_time_factor, 3), (board.real_time_factor ?? 0) > 1],
    ["figure-utterances", number(board.utterances)],
    ["figure-cpu", number(board.cpu_load * 100, 0, "%")],
    ["figure-memory", number(board.memory_bytes / 2 ** 20, 0, "MiB")],
    ["figure-temperature", number(board.temperature_c, 0, "°C"), board.throttled.length > 0],
  ];
  by("figures").replaceChildren(...shown.map(([name, value, bad]) => {
    const figure = element("div", "", bad ? "bad" : "");
    figure.append(element("p", value, "value"), element("p", text(name), "name"));
    return figure;
  }));
}

function sources(found) {
  rows("sources", Object.entries(found).map(([name, health]) => {
    const meter = document.createElement("meter");
    Object.assign(meter, { min: -80, max: 0, low: -60, high: -3, optimum: -30, value: health.level_dbfs ?? -80 });
    meter.ariaLabel = `${text("level")} ${name}`;
    meter.title = health.level_dbfs === null ? "–" : `${health.level_dbfs} dBFS`;
    return [name, meter, health.snr_db === null ? "–" : `${health.snr_db.toFixed(0)} dB`, health.lost_s.toFixed(1)];
  }), [2, 3]);
}

function sessions(found) {
  const of = (session) => !session.attached ? "session-away" : session.talking ? "session-talking" : "session-idle";
  rows("sessions", found.map((each) => [each.source, `${each.kind} ${each.format}`, each.address, text(of(each))]));
}

function rows(id, lines, numbers = []) {
  const body = by(id).tBodies[0];
  body.replaceChildren(...lines.map((cells) => {
    const line = document.createElement("tr");
    cells.forEach((cell, place) => {
      const column = element("td", typeof cell === "string" ? cell : "", numbers.includes(place) ? "number" : "");
      if (typeof cell !== "string") column.append(cell);
      line.append(column);
    });
    return line;
  }));
  if (!lines.length) {
    const line = document.createElement("tr");
    const cell = element("td", text("nobody"), "empty");
    cell.colSpan = 4;
    line.append(cell);
    body.append(line);
  }
}

function alarms(found) {
  by("alarms").hidden = !found.length;
  by("alarms").querySelector("ul").replaceChildren(...found.map((alarm) => {
    const line = element("li", "", alarm.severity);
    line.append(element("strong", alarm.detail), element("span", alarm.remedy, "hint"));
    return line;
  }));
}

let shownUntil = "";

function said(messages) {
  const newest = messages.at(-1)?.id ?? "";
  if (newest === shownUntil) return;
  shownUntil = newest;
  const kept = messages.filter(({ utterance_id: at }) => at).reverse();
  by("history").replaceChildren(...kept.map((event) => {
    const line = document.createElement("li");
    draw(line, event, event.type);
    return line;
  }));
}

function about({ meta, clock_synchronized: synchronized }) {
  const facts = {
    model: meta.model, hash: meta.model_sha256, provider: meta.provider, grammars: Object.keys(meta.grammars).join(", "),
    broker: meta.broker ?? "–", clock: text(synchronized ? "clock-good" : "clock-bad"),
  };
  by("about").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => [element("dt", text(`about-${name}`)), element("dd", value)]),
  );
}

function element(tag, words = "", kind = "") {
  const made = document.createElement(tag);
  made.textContent = words;
  if (kind) made.className = kind;
  return made;
}

state("connecting");
look();
setInterval(() => document.hidden || look(), 1000);
