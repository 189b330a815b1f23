// The page of one station: the talk button, what was understood, what waits for a yes.

import { draw, slots } from "./history.js";
import { Microphone, MicrophoneError, PIECE_MS } from "./microphone.js";
import { Socket } from "./socket.js";
import { choose, fill, known, text } from "./texts.js";
import { RATE, Voice } from "./voice.js";

const TAIL_MS = 250; // people let go of the button before they have finished the word
const HISTORY = 100;

const by = (id) => document.getElementById(id);
const stored = (key, otherwise) => localStorage.getItem(key) ?? otherwise;

const fragment = new URLSearchParams(location.hash.slice(1));
if (fragment.get("token")) {
  localStorage.setItem("token", fragment.get("token"));
  history.replaceState(null, "", location.pathname);
}

const options = {
  mode: stored("mode", "hold"),
  language: stored("language", navigator.language.startsWith("zh") ? "zh" : "en"),
  way: stored("way", "auto"),
};

const microphone = new Microphone();
const voice = new Voice();
voice.addEventListener("lost", () => link.takeOver());
voice.addEventListener("state", () => (by("talk").dataset.call = voice.peer?.connectionState ?? "none"));
let recording = null; // of MediaRecorder, while it runs
let link = newLink();
let talking = false;
let ended = Promise.resolve(); // when the last of the talk before has been sent
let wanted = false;
let broker = "unknown";
let final = ""; // what was understood last in this talk
let question = null;
let noticed = null;
const items = new Map(); // utterance id -> its line of the history

function newLink() {
  const fresh = new Socket(stored("token", ""));
  fresh.byRtp = () => voice.connected && voice.session === fresh.session;
  fresh.addEventListener("state", showState);
  fresh.addEventListener("event", ({ detail }) => handle(detail));
  fresh.addEventListener("refused", () => notice("token-needed", "enter-token", () => openOptions("token")));
  fresh.addEventListener("full", () => notice("error-busy"));
  fresh.addEventListener("dropped", () => notice("kept-too-long"));
  return fresh;
}

// ---------------------------------------------------------------- the button

async function begin() {
  wanted = true;
  clearTimeout(finish.tail);
  if (talking) return; // pressed again within the tail: one talk
  try {
    await microphone.open(onPiece, onUnplugged);
    await ended;
  } catch (error) {
    wanted = false;
    if (!(error instanceof MicrophoneError)) throw error;
    notice(error.message);
    return;
  }
  clearNotice();
  link.connect();
  call();
  if (!wanted || talking) return; // let go while the browser asked for permission, or pressed twice
  if (options.way === "opus" && Microphone.records) {
    recording = microphone.record((bytes) => link.put(bytes, bytes.length, PIECE_MS / 1000));
    link.start(recording.format, RATE, 0);
  } else {
    const before = microphone.before();
    const samples = before.reduce((sum, pcm) => sum + pcm.length, 0);
    const rtp = options.way === "auto" && link.byRtp() && microphone.rate === RATE;
    link.start(rtp ? "rtp" : "pcm16", microphone.rate, (1000 * samples) / microphone.rate);
    before.forEach(putPcm);
  }
  talking = true;
  final = "";
  showTalk();
  live(text(link.state === "on" ? "listening" : "sending-later"), "hint");
}

function finish() {
  wanted = false;
  if (!talking) return;
  clearTimeout(finish.tail);
  finish.tail = setTimeout(() => {
    talking = false;
    ended = endTalk();
    showTalk();
    live(text(link.state === "on" ? "transcribing" : "sending-later"), "hint");
  }, TAIL_MS);
}

async function endTalk() {
  const { stop } = recording ?? {};
  recording = null;
  await stop?.();
  link.end();
}

/** Have the next talk go by WebRTC, if that works here. */
function call() {
  if (options.way === "auto" && microphone.stream?.active && link.session && microphone.rate === RATE) {
    voice.connect(microphone.stream, stored("token", ""), link.session);
  }
}

function putPcm(pcm) {
  link.put(new Uint8Array(pcm.buffer), pcm.length, pcm.length / microphone.rate);
}

function onPiece(pcm, peak) {
  by("meter").firstElementChild.style.transform = `scaleX(${Math.max(0, 1 + Math.log10(peak + 1e-4) / 3)})`;
  if (talking && !recording) putPcm(pcm);
}

/** What is being said comes no further, while silence would be taken for it. */
function onUnplugged() {
  if (!talking) return; // the next press asks for another one
  finish();
  notice("no-microphone");
}

const button = by("talk");
button.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  if (options.mode === "hold") {
    button.setPointerCapture(event.pointerId);
    begin();
  } else (wanted ? finish() : begin());
});
for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) {
  button.addEventListener(kind, () => options.mode === "hold" && finish());
}
button.addEventListener("contextmenu", (event) => event.preventDefault());
button.addEventListener("click", (event) => {
  if (event.detail === 0) (wanted ? finish() : begin()); // screen readers click without a pointer
});
let held = false; // the space bar, by which this button was pressed: wherever the focus is then, it is let go here
const isTalkKey = (event) =>
  event.code === "Space" && (held || !event.target.closest("input, dialog, a, button:not(#talk)"));
document.addEventListener("keydown", (event) => {
  if (!isTalkKey(event)) return;
  event.preventDefault();
  if (event.repeat) return;
  held = true;
  if (options.mode === "hold") begin();
  else (wanted ? finish() : begin());
});
document.addEventListener("keyup", (event) => {
  if (!isTalkKey(event)) return;
  event.preventDefault();
  held = false;
  if (options.mode === "hold") finish();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) finish();
  else if (link.session) link.connect();
});
addEventListener("blur", () => {
  held = false;
  if (options.mode === "hold") finish();
});

// ---------------------------------------------------------------- what comes back

function handle(event) {
  const at = event.utterance_id;
  switch (event.type) {
    case "ready":
      by("station").textContent = event.source;
      microphone.prepare(); // where that has failed
      call();
      if (noticed?.key !== "kept-too-long") clearNotice();
      break;
    case "transcribing":
      live(event.text || text("transcribing"), event.text ? "partial" : "hint");
      break;
    case "transcript":
      item(at, event);
      final = event.text;
      live(final, "final");
      break;
    case "pending":
      item(at, event);
      ask(event);
      break;
    case "command":
    case "expired":
    case "rejected":
      item(at, event);
      if (question?.utterance_id === at) unask();
      if (event.type === "rejected" && !event.text) live(text(`reason-${event.reason}`), "hint");
      break;
    case "ended":
      if (!talking) live(final || text("idle"), final ? "final" : "hint");
      break;
    case "status":
      broker = event.broker;
      showState();
      break;
    case "overloaded":
      live(text("overloaded"), "hint");
      break;
    case "error":
      if (event.reason === "lost") finish();
      notice(known(`error-${event.reason}`) ? `error-${event.reason}` : event.detail);
      break;
  }
}

function live(words, kind) {
  const element = by("live");
  element.textContent = words;
  element.className = kind;
}

/** One line of the history per utterance; what becomes of it changes the line. */
function item(id, event) {
  let line = items.get(id);
  if (!line) {
    line = document.createElement("li");
    items.set(id, line);
    by("history").prepend(line);
    by("nothing-yet").hidden = true;
    if (items.size > HISTORY) {
      const [oldest, gone] = items.entries().next().value;
      items.delete(oldest);
      gone.remove();
    }
  }
  line.event = { ...line.event, ...event };
  line.kind = event.type;
  draw(line, line.event, line.kind);
}

// ---------------------------------------------------------------- a yes or no

function ask(event) {
  question = event;
  by("question-text").textContent = event.read_back;
  by("question-slots").replaceChildren();
  slots(by("question-slots"), event);
  by("question").hidden = false;
  by("question").focus({ preventScroll: true }); // not on Yes: the space bar is for talking, and No can be said
  const until = performance.now() + Math.max(1000, new Date(event.confirm_until) - new Date(event.time));
  const whole = until - performance.now();
  clearInterval(ask.clock);
  ask.clock = setInterval(() => {
    by("question-time").value = Math.max(0, (until - performance.now()) / whole);
  }, 200);
}

function unask() {
  question = null;
  clearInterval(ask.clock);
  by("question").hidden = true;
  button.focus({ preventScroll: true });
}

by("confirm").addEventListener("click", () => question && link.answer(question, "confirm"));
by("cancel").addEventListener("click", () => question && link.answer(question, "cancel"));

// ---------------------------------------------------------------- how things stand

function notice(key, action, act) {
  noticed = { key, action, act };
  by("notice").hidden = false;
  by("notice-text").textContent = text(key);
  by("notice-help").textContent = known(`${key}-help`) ? text(`${key}-help`) : "";
  by("notice-action").hidden = !action;
  by("notice-action").textContent = action ? text(action) : "";
  by("notice-action").onclick = act ?? null;
}

function clearNotice() {
  noticed = null;
  by("notice").hidden = true;
}

function showState() {
  const gateway = by("gateway-state");
  gateway.dataset.state = link.state;
  gateway.textContent = text(`gateway-${link.state}`);
  for (const id of ["confirm", "cancel"]) by(id).disabled = link.state !== "on"; // it would not arrive
  const chip = by("broker-state");
  chip.dataset.state = link.state === "on" ? broker : "unknown";
  chip.textContent = text(`broker-${chip.dataset.state}`);
  if ((talking || link.waiting) && link.state !== "on") live(text("sending-later"), "hint");
}

function showTalk() {
  button.dataset.state = talking ? "talking" : "idle";
  button.setAttribute("aria-pressed", String(talking));
  const key = options.mode === "hold" ? (talking ? "release" : "hold") : talking ? "press-again" : "press";
  by("talk-text").textContent = text(key);
  by("talk-hint").textContent = matchMedia("(hover: hover)").matches ? text("keys") : "";
}

// ---------------------------------------------------------------- options

function openOptions(focus) {
  by("token").value = stored("token", "");
  by("options").showModal();
  if (focus) by(focus).focus();
}

by("open-options").addEventListener("click", () => openOptions());
by("options").addEventListener("change", ({ target }) => {
  if (!(target.name in options)) return;
  options[target.name] = target.value;
  localStorage.setItem(target.name, target.value);
  translate();
});
by("options").addEventListener("close", () => {
  const token = by("token").value.trim();
  if (token === stored("token", "")) return;
  localStorage.setItem("token", token);
  link.disconnect();
  link = newLink();
  link.connect();
});

function translate() {
  choose(options.language);
  fill(document);
  for (const [name, value] of Object.entries(options)) {
    for (const input of document.querySelectorAll(`input[name=${name}]`)) input.checked = input.value === value;
  }
  if (by("live").className === "hint") live(text(talking ? "listening" : "idle"), "hint");
  items.forEach((line) => draw(line, line.event, line.kind));
  if (noticed) notice(noticed.key, noticed.action, noticed.act);
  showState();
  showTalk();
}

translate();
if (!window.isSecureContext) notice("need-https");
microphone.prepare();
link.connect();
