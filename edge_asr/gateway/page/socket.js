// Carries talks over a WebSocket: numbers the audio, keeps what is not acknowledged, and resends it after a reconnect.
//
// Law: a piece of audio is forgotten only when the gateway has acknowledged it, or when more than KEEP_S wait.

const KEEP_S = 30;
const PING_MS = 3000;
const SILENT_MS = 10000;
const RETRY_MS = [250, 500, 1000, 2000, 5000];

export class Socket extends EventTarget {
  constructor(token) {
    super();
    this.token = token;
    this.state = "off";
    this.talks = []; // {number, began (performance.now of its first sample), pieces: [{position, pcm}], length, ended}
    this.count = 0;
    this.session = null;
    this.have = 0;
    this.failures = 0;
    addEventListener("online", () => this.connect());
  }

  /** Connect, or do nothing where a connection is there or under way. */
  connect() {
    if (this.socket && this.socket.readyState <= WebSocket.OPEN) return;
    clearTimeout(this.retry);
    this.#is("connecting");
    const socket = new WebSocket(new URL("ws", location.href.replace(/^http/, "ws")));
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => socket.send(JSON.stringify({
      type: "hello", have: this.have,
      ...(this.token && { token: this.token }), ...(this.session && { session: this.session }),
    }));
    socket.onmessage = ({ data }) => this.#hear(JSON.parse(data));
    socket.onclose = ({ code }) => socket === this.socket && this.#lost(code);
    this.heard = performance.now();
    clearInterval(this.pulse);
    this.pulse = setInterval(() => this.#beat(), PING_MS);
  }

  disconnect() {
    const socket = this.socket;
    this.socket = null;
    clearTimeout(this.retry);
    clearInterval(this.pulse);
    socket?.close();
    this.#is("off");
  }

  /** Begin a talk of so many samples per second whose first was captured so many milliseconds ago. */
  start(rate, age) {
    const talk = { number: ++this.count, rate, began: performance.now() - age, pieces: [], length: 0, ended: false };
    this.talks.push(talk);
    this.#sendStart(talk);
  }

  /** Send a piece of the talk under way. */
  put(pcm) {
    const talk = this.talks.at(-1);
    if (!talk || talk.ended) return;
    const piece = { position: talk.length, pcm };
    talk.length += pcm.length;
    talk.pieces.push(piece);
    this.#sendAudio(piece);
    this.#forgetOldest();
  }

  end() {
    const talk = this.talks.at(-1);
    if (!talk || talk.ended) return;
    talk.ended = true;
    this.#send({ type: "end" });
  }

  answer(pendingId, answer) {
    this.#send({ type: "answer", pending_id: pendingId, answer });
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
    if (event.resumed) this.#forget({ talk: event.talk, position: event.position, ended: false });
    else this.have = 0;
    this.#is("on");
    for (const talk of this.talks) {
      this.#sendStart(talk);
      for (const piece of talk.pieces) this.#sendAudio(piece);
      if (talk.ended) this.#send({ type: "end" });
    }
  }

  #forget({ talk: number, position, ended }) {
    this.talks = this.talks.filter((talk) => talk.number > number || (talk.number === number && !ended));
    const talk = this.talks.find((each) => each.number === number);
    if (talk) talk.pieces = talk.pieces.filter((piece) => piece.position + piece.pcm.length > position);
  }

  #forgetOldest() {
    const seconds = ({ pieces, rate }) => pieces.reduce((sum, { pcm }) => sum + pcm.length, 0) / rate;
    if (this.talks.reduce((sum, talk) => sum + seconds(talk), 0) <= KEEP_S) return;
    const oldest = this.talks.find((talk) => talk.pieces.length);
    const { pcm } = oldest.pieces.shift();
    if (!oldest.pieces.length && oldest.ended) this.talks.splice(this.talks.indexOf(oldest), 1);
    this.dispatchEvent(new CustomEvent("dropped", { detail: pcm.length / oldest.rate }));
  }

  #sendStart({ number, rate, began }) {
    this.#send({ type: "start", talk: number, rate, age_ms: Math.min(60000, performance.now() - began) });
  }

  #send(message) {
    if (this.state === "on") this.socket.send(JSON.stringify(message));
  }

  #sendAudio({ position, pcm }) {
    if (this.state !== "on") return;
    const message = new Uint8Array(4 + pcm.byteLength);
    new DataView(message.buffer).setUint32(0, position, true);
    message.set(new Uint8Array(pcm.buffer), 4);
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

  #lost(code) {
    clearInterval(this.pulse);
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
