/* Browsers start no workers for pages that are opened from a file. The search's worker runs in a hidden frame then. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      this.ready = new Promise((ready) => {
        frame.onload = () => {
          const inside = frame.contentWindow, script = inside.document.createElement("script")
          inside.postMessage = (data) => {
            const event = new MessageEvent("message", { data })
            this.dispatchEvent(event)
            if (this.onmessage) this.onmessage(event)
          }
          script.onload = () => ready(inside)
          script.src = new URL(url, document.baseURI)
          inside.document.body.append(script)
        }
      })
      const add = () => document.body.append(frame)
      document.body ? add() : addEventListener("DOMContentLoaded", add)
    }
    postMessage(data) {
      this.ready.then((inside) => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }
    terminate() {}
  }
}
