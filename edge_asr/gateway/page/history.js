// Draws one line of what was said and what became of it; the page and the dashboard share it.

import { speaksTheBoxs, text } from "./texts.js";

/** `event`: the data of docs/mqtt.md; `kind`: transcript, command, pending, rejected or expired. */
export function draw(line, event, kind) {
  const watched = document.body.matches(".dashboard");
  line.dataset.kind = kind;
  line.replaceChildren();
  const time = add(line, "time", new Date(event.end ?? event.time).toLocaleTimeString([], { hour12: false }));
  time.dateTime = event.end ?? event.time;
  const body = add(line, "div");
  if (event.text) add(body, "p", event.text, "said");
  if (event.intent && kind !== "rejected") {
    add(add(body, "p", "", "intent"), "strong", event.intent);
    slots(add(body, "dl", "", "slots"), event);
  }
  const badges = add(body, "p", "", "badges");
  add(badges, "span", kind === "rejected" ? text(`reason-${event.reason}`) : text(kind), "badge kind");
  if (event.source && watched) add(badges, "span", event.source, "badge");
  if (kind === "command" && event.confirmed) add(badges, "span", text("kind-confirmed"), "badge");
  if (event.language && event.language !== "nospeech") add(badges, "span", text(`lang-${event.language}`), "badge");
  if (event.emotion && !/UNK/.test(event.emotion)) add(badges, "span", text(`emotion-${event.emotion}`), "badge");
  if (event.event && !/^Speech|UNK/.test(event.event)) add(badges, "span", text(`event-${event.event}`), "badge");
  if (event.confidence > 0) add(badges, "span", `${Math.round(100 * event.confidence)} % ${text("sure")}`, "badge");
  if (kind === "expired") add(body, "p", text("expired-detail"), "hint");
  else if (kind === "rejected" && event.detail && (watched || speaksTheBoxs())) add(body, "p", event.detail, "hint");
}

export function slots(list, event) {
  for (const [name, value] of Object.entries(event.slots ?? {})) {
    const pair = add(list, "div");
    add(pair, "dt", name);
    add(pair, "dd", [value, event.units?.[name]].filter((part) => part !== undefined).join(" "));
  }
}

function add(parent, tag, words = "", kind = "") {
  const element = document.createElement(tag);
  element.textContent = words;
  if (kind) element.className = kind;
  parent.append(element);
  return element;
}
