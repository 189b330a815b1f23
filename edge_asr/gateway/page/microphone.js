// The microphone: asks for permission, says in plain words what is wrong, and hands out pieces of PCM with their level.

import { RATE } from "./voice.js";

const BEFORE_MS = 320;
export const PIECE_MS = 100; // of a compressed stream
const KINDS = { webm: "audio/webm;codecs=opus", ogg: "audio/ogg;codecs=opus" };

export class MicrophoneError extends Error {}

export class Microphone {
  #recent = [];
  #opening = null;
  #ears = null; // see prepare()

  /** Load what captures while the link is there: a press must be heard without it, too. */
  prepare() {
    return (this.#ears ??= ears().catch(() => (this.#ears = null)));
  }

  /** Whoever calls meanwhile waits for the same opening. Raises MicrophoneError whose message is a key of texts.js. */
  async open(onPiece, onEnded) {
    if (!this.stream?.active) {
      await (this.#opening ??= this.#open(onPiece, onEnded).finally(() => (this.#opening = null)));
    }
    await this.context.resume(); // a locked screen or a phone call suspends it
  }

  async #open(onPiece, onEnded) {
    this.source?.disconnect(); // one that was unplugged
    this.#recent = [];
    const stream = await allowed();
    const found = await this.prepare();
    const ear = found && joined(found, stream);
    if (!ear) {
      this.#ears = null; // the sound card's rate may be another now
      stream.getTracks().forEach((track) => track.stop());
      throw new MicrophoneError(found ? "no-microphone" : "gateway-off"); // which has the worklet
    }
    const { capture, source } = ear;
    capture.port.onmessage = ({ data }) => {
      this.#recent.push(data.pcm);
      while (this.#recent.length > BEFORE_MS / 40) this.#recent.shift();
      onPiece(data.pcm, data.peak);
    };
    stream.getAudioTracks()[0].addEventListener("ended", onEnded);
    Object.assign(this, { stream, source, context: capture.context });
  }

  get rate() {
    return this.context.sampleRate;
  }

  /** Whether this browser records what the gateway can read; some iPhones record MP4 alone. */
  static get records() {
    return Object.values(KINDS).some((kind) => window.MediaRecorder?.isTypeSupported(kind));
  }

  /** Record as a compressed stream until the function that it returns is called, which waits for the last of it. */
  record(onBytes) {
    const [format, mimeType] = Object.entries(KINDS).find(([, kind]) => MediaRecorder.isTypeSupported(kind));
    const recorder = new MediaRecorder(this.stream, { mimeType, audioBitsPerSecond: 48000 });
    let last = Promise.resolve();
    const stopped = new Promise((resolve) => (recorder.onstop = () => last.then(resolve))); // unplugged, by itself
    recorder.ondataavailable = ({ data }) => {
      last = last.then(async () => onBytes(new Uint8Array(await data.arrayBuffer())));
    };
    recorder.start(PIECE_MS);
    const stop = () => {
      if (recorder.state !== "inactive") recorder.stop();
      return stopped;
    };
    return { format, stop };
  }

  /** What was captured just before now: a first word begins before the thumb has landed. */
  before() {
    return this.#recent.slice();
  }
}

async function allowed() {
  if (!window.isSecureContext || !navigator.mediaDevices) throw new MicrophoneError("need-https");
  try {
    return await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true },
    });
  } catch (error) {
    const known = { NotAllowedError: "denied", NotFoundError: "no-microphone", NotReadableError: "busy-microphone" };
    throw new MicrophoneError(known[error.name] ?? "no-microphone");
  }
}

/** What turns a microphone into pieces: at the rate of Opus, or at the sound card's own. */
async function ears() {
  const own = new AudioContext({ latencyHint: "interactive" });
  const contexts = own.sampleRate === RATE ? [own] : [new AudioContext({ latencyHint: "interactive", sampleRate: RATE }), own];
  contexts.forEach((context) => context.suspend()); // or they would begin by themselves, where a page may play sound
  try {
    await Promise.all(contexts.map(({ audioWorklet }) => audioWorklet.addModule("worklet.js")));
  } catch (error) {
    contexts.forEach((context) => context.close());
    throw error;
  }
  return contexts.map((context) => new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 }));
}

function joined([capture, ...others], stream) {
  if (!capture) return null;
  try {
    const source = capture.context.createMediaStreamSource(stream);
    source.connect(capture);
    return { capture, source };
  } catch {
    return joined(others, stream); // Firefox resamples no microphone
  }
}
