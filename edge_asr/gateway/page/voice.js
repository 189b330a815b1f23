// The microphone by WebRTC: one call (WHIP) that carries the audio of a session; the talks are begun and ended elsewhere.

export const RATE = 48000; // of Opus: positions within a talk count in it

export class Voice extends EventTarget {
  #call = 0;

  get connected() {
    return this.peer?.connectionState === "connected";
  }

  /** Call, unless a call is there or under way; failing is no error, for there is another way. */
  async connect(stream, token, session) {
    const [track] = stream.getAudioTracks();
    if (this.peer && this.session === session) {
      const [sender] = this.peer.getSenders();
      if (sender.track !== track) await sender.replaceTrack(track); // of a headset that was plugged in again
      return;
    }
    await this.close();
    const call = ++this.#call;
    this.session = session;
    const peer = (this.peer = new RTCPeerConnection());
    peer.addTransceiver(track, { direction: "sendonly", streams: [stream] });
    peer.onconnectionstatechange = () => {
      if (peer !== this.peer) return;
      this.dispatchEvent(new Event("state"));
      if (["disconnected", "failed", "closed"].includes(peer.connectionState)) this.#lose();
    };
    try {
      await peer.setLocalDescription(await peer.createOffer());
      await gathered(peer);
      const response = await fetch("whip", {
        method: "POST",
        body: peer.localDescription.sdp,
        headers: { "Content-Type": "application/sdp", Session: session, ...(token && { Authorization: `Bearer ${token}` }) },
        signal: AbortSignal.timeout(5000),
      });
      if (!response.ok) throw new Error(`the gateway answered ${response.status}`);
      await peer.setRemoteDescription({ type: "answer", sdp: await response.text() });
    } catch {
      if (call === this.#call) this.#lose();
    }
  }

  async close() {
    this.#call++;
    this.peer?.close();
    this.peer = this.session = undefined;
  }

  #lose() {
    this.close();
    this.dispatchEvent(new Event("lost"));
  }
}

function gathered(peer) {
  if (peer.iceGatheringState === "complete") return Promise.resolve();
  return new Promise((resolve) => {
    setTimeout(resolve, 1000);
    peer.onicegatheringstatechange = () => peer.iceGatheringState === "complete" && resolve();
  });
}
