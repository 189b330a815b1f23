// The microphone: asks for permission, says in plain words what is wrong, and hands out pieces of PCM with their level.

const BEFORE_MS = 320;
export const PIECE_MS = 100; // of a compressed stream
const KINDS = { webm: "audio/webm;codecs=opus", ogg: "audio/ogg;codecs=opus" };

export class MicrophoneError extends Error {}

export class Microphone {
  #recent = [];
  #opening = null;

  /** Whoever calls meanwhile waits for the same opening. Raises MicrophoneError whose message is a key of texts.js. */
  async open(onPiece, onEnded) {
    if (!this.stream?.active) {
      await (this.#opening ??= this.#open(onPiece, onEnded).finally(() => (this.#opening = null)));
    }
    await this.context.resume(); // a locked screen or a phone call suspends it
  }

  async #open(onPiece, onEnded) {
    await this.close(); // of one that was unplugged
    const stream = await allowed();
    let context;
    try {
      context = await listening(stream, ({ data }) => {
        this.#recent.push(data.pcm);
        while (this.#recent.length > BEFORE_MS / 40) this.#recent.shift();
        onPiece(data.pcm, data.peak);
      });
    } catch {
      stream.getTracks().forEach((track) => track.stop());
      throw new MicrophoneError("gateway-off"); // which has the worklet
    }
    stream.getAudioTracks()[0].addEventListener("ended", onEnded);
    Object.assign(this, { stream, context });
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
    recorder.ondataavailable = ({ data }) => {
      last = last.then(async () => onBytes(new Uint8Array(await data.arrayBuffer())));
    };
    recorder.start(PIECE_MS);
    const stop = () => new Promise((resolve) => {
      recorder.onstop = () => last.then(resolve);
      recorder.stop();
    });
    return { format, stop };
  }

  /** What was captured just before now: a first word begins before the thumb has landed. */
  before() {
    return this.#recent.slice();
  }

  async close() {
    this.stream?.getTracks().forEach((track) => track.stop());
    await this.context?.close();
    this.stream = this.context = undefined;
    this.#recent = [];
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

async function listening(stream, onMessage) {
  let context;
  try {
    context = new AudioContext({ latencyHint: "interactive", sampleRate: 48000 });
    context.createMediaStreamSource(stream).disconnect();
  } catch {
    context = new AudioContext({ latencyHint: "interactive" }); // Firefox resamples no microphone
  }
  try {
    await context.audioWorklet.addModule("worklet.js");
  } catch (error) {
    context.close();
    throw error;
  }
  const capture = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
  context.createMediaStreamSource(stream).connect(capture);
  capture.port.onmessage = onMessage;
  return context;
}
