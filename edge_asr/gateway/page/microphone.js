// The microphone: asks for permission, says in plain words what is wrong, and hands out pieces of PCM with their level.

const BEFORE_MS = 300;

export class MicrophoneError extends Error {}

export class Microphone {
  #recent = [];

  /** Raises MicrophoneError whose message is a key of texts.js. */
  async open(onPiece) {
    if (this.stream?.active) return;
    if (!window.isSecureContext || !navigator.mediaDevices) throw new MicrophoneError("need-https");
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({
        audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true },
      });
    } catch (error) {
      const known = { NotAllowedError: "denied", NotFoundError: "no-microphone", NotReadableError: "busy-microphone" };
      throw new MicrophoneError(known[error.name] ?? "no-microphone");
    }
    this.context = new AudioContext({ latencyHint: "interactive" });
    await this.context.audioWorklet.addModule("worklet.js");
    const capture = new AudioWorkletNode(this.context, "capture", { numberOfOutputs: 0 });
    this.context.createMediaStreamSource(this.stream).connect(capture);
    capture.port.onmessage = ({ data }) => {
      this.#recent.push(data.pcm);
      while (this.#recent.length > BEFORE_MS / 20) this.#recent.shift();
      onPiece(data.pcm, data.peak);
    };
    await this.context.resume();
  }

  get rate() {
    return this.context.sampleRate;
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
