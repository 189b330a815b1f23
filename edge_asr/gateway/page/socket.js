// Carries talks over a WebSocket: numbers the audio, keeps what is not acknowledged, and resends it after a reconnect.
//
// Law: a piece of audio is forgotten only when the gateway has acknowledged it, or when more than KEEP_S wait.

const KEEP_S = 30;
const PING_MS = 3000;
const RTP_MS = 2500; // without an acknowledgement so long, WebRTC does not work
const SILENT_MS = 10000;
const RETRY_MS = [250, 500, 1000, 2000, 5000];

export class Socket extends EventTarget {
  constructor(token) {
    super();
    this.token = token;
    this.state = "off";
    this.talks = []; // see start()
    this.byRtp = () => false; // whether audio really goes by WebRTC now
    this.count = 0;
    this.session = sessionStorage.getItem("session"); // a reloaded page goes on with its session
    this.have = 0;
    this.failures = 0;
    this.gone = new AbortController();
    addEventListener("online", () => this.connect(), { signal: this.gone.signal });
  }

  /** Connect, or do nothing where a connection is there or under way. */
  connect() {
    if (this.socket && this.socket.readyState <= WebSocket.OPEN) return;
    clearTimeout(this.retry);
    this.#is("connecting");
    const address = this.session ? "ws?resume" : "ws"; // who comes back is let in where there is no room
    const socket = new WebSocket(new URL(address, location.href.replace(/^http/, "ws")));
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => socket.send(JSON.stringify({
      type: "hello", have: this.have,
      ...(this.token && { token: this.token }), ...(this.session && { session: this.session }),
    }));
    socket.onmessage = ({ data }) => this.#hear(JSON.parse(data));
    socket.onclose = ({ code }) => socket === this.socket && this.#lost(code);
    socket.onerror = () => socket === this.socket && this.state === "connecting" && this.#ask();
    this.heard = performance.now();
    clearInterval(this.pulse);
    this.pulse = setInterval(() => this.#beat(), PING_MS);
  }

  /** For good: another one takes its place. */
  disconnect() {
    this.gone.abort();
    const socket = this.socket;
    this.socket = null;
    clearTimeout(this.retry);
    clearInterval(this.pulse);
    socket?.close();
    this.#is("off");
  }

  /** Begin a talk whose first sample was captured so many milliseconds ago. Of format rtp it is only kept here, in PCM,
      while WebRTC carries it. */
  start(format, rate, age) {
    const now = performance.now();
    const talk = { number: Infinity, format, rate, began: now - age, acked: now, pieces: [], length: 0, ended: false };
    this.talks.push(talk);
    this.#sendStart(talk);
  }

  /** Send a piece of the talk under way: so many samples (PCM) or bytes (webm, ogg), and so many seconds. */
  put(bytes, units, seconds) {
    const talk = this.talks.at(-1);
    if (!talk || talk.ended) return;
    const piece = { position: talk.length, bytes, units, seconds };
    talk.length += units;
    talk.pieces.push(piece);
    if (talk.format !== "rtp") this.#sendAudio(piece);
    else if (!this.byRtp() || performance.now() - talk.acked > RTP_MS) this.takeOver();
    this.#forgetOldest();
  }

  /** WebRTC has failed: what it has not brought goes this way. */
  takeOver() {
    const talk = this.talks.at(-1);
    if (talk?.format !== "rtp") return;
    talk.format = "pcm16";
    for (const piece of talk.pieces) this.#sendAudio(piece);
  }

  end() {
    const talk = this.talks.at(-1);
    if (!talk || talk.ended) return;
    talk.ended = true;
    this.#send({ type: "end" });
  }

  answer({ pending_id, confirmations_left }, answer) {
    this.#send({ type: "answer", answer, pending_id, confirmations_left });
  }

  get waiting() {
    return this.talks.length > 0;
  }

  #hear(event) {
    this.heard = performance.now();
    if (event.n) this.have = event.n;
    if (event.type === "ready") this.#resume(event);
    else if (event.type === "ack") this.#forget(event);
    this.dispatchEvent(new CustomEvent("event", { detail: event }));
  }

  /** The gateway says how far it has heard us; the rest goes again. */
  #resume(event) {
    this.failures = 0;
    this.session = event.session;
    this.count = Math.max(this.count, event.talk);
    sessionStorage.setItem("session", event.session);
    if (event.resumed) this.#forget({ talk: event.talk, position: event.position, ended: false });
    else this.have = 0;
    this.#is("on");
    for (const talk of this.talks) {
      this.#sendStart(talk);
      if (talk.format === "rtp" && (talk.ended || !this.byRtp())) talk.format = "pcm16";
      if (talk.format !== "rtp") for (const piece of talk.pieces) this.#sendAudio(piece);
      if (talk.ended) this.#send({ type: "end" });
    }
  }

  #forget({ talk: number, position, ended }) {
    this.talks = this.talks.filter((talk) => talk.number > number || (talk.number === number && !ended));
    const talk = this.talks.find((each) => each.number === number);
    if (!talk) return;
    talk.acked = performance.now();
    talk.pieces = talk.pieces.filter((piece) => piece.position + piece.units > position);
  }

  #forgetOldest() {
    const kept = this.talks.flatMap(({ pieces }) => pieces).reduce((sum, { seconds }) => sum + seconds, 0);
    if (kept <= KEEP_S) return;
    const oldest = this.talks.find((talk) => talk.pieces.length);
    const { seconds } = oldest.pieces.shift();
    if (!oldest.pieces.length && oldest.ended) this.talks.splice(this.talks.indexOf(oldest), 1);
    this.dispatchEvent(new CustomEvent("dropped", { detail: seconds }));
  }

  /** Here a talk gets its number: before, a page that was loaded again does not know how many its session has had. */
  #sendStart(talk) {
    if (this.state !== "on") return;
    if (talk.number === Infinity) talk.number = ++this.count;
    const { number, format, rate, began } = talk;
    this.#send({ type: "start", talk: number, format, rate, age_ms: performance.now() - began });
  }

  #send(message) {
    if (this.state === "on") this.socket.send(JSON.stringify(message));
  }

  #sendAudio({ position, bytes }) {
    if (this.state !== "on") return;
    const message = new Uint8Array(4 + bytes.byteLength);
    new DataView(message.buffer).setUint32(0, position, true);
    message.set(bytes, 4);
    this.socket.send(message);
  }

  #beat() {
    if (performance.now() - this.heard > SILENT_MS) {
      const socket = this.socket;
      this.socket = null; // its own close event may take minutes on a dead link
      socket?.close();
      this.#lost(1006);
    } else if (this.state === "on") this.#send({ type: "ping" });
  }

  /** Browsers do not say why a WebSocket was not let in. */
  async #ask() {
    const response = await fetch("ws").catch(() => undefined);
    if ([429, 503].includes(response?.status)) this.dispatchEvent(new Event("full"));
  }

  #lost(code) {
    clearInterval(this.pulse);
    if (code === 4409) {
      this.session = null; // a page opened twice: the other one has it now
      this.have = 0;
    }
    if (code === 4401) {
      this.socket = null;
      this.#is("off");
      this.dispatchEvent(new Event("refused"));
      return;
    }
    this.#is("off");
    const pause = RETRY_MS[Math.min(this.failures++, RETRY_MS.length - 1)];
    this.retry = setTimeout(() => this.connect(), pause * (0.5 + Math.random()));
  }

  #is(state) {
    if (this.state === state) return;
    this.state = state;
    this.dispatchEvent(new Event("state"));
  }
}
