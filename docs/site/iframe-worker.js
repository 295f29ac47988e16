/* Browsers refuse workers to pages opened as files. There, the search's worker runs in a hidden frame instead.
   Its name tells Material's plugin "offline" not to load one from a server. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.target = frame.contentWindow;
      this.listen = (event) => {
        if (event.source === this.target) {
          this.dispatchEvent(new MessageEvent("message", { data: event.data }));
        }
      };
      addEventListener("message", this.listen);
      const page = frame.contentDocument;
      page.open();
      page.write("<!doctype html><script>self.postMessage = parent.postMessage.bind(parent);</" + "script>");
      const script = page.createElement("script");
      script.src = url;
      this.ready = new Promise((resolve) => (script.onload = resolve));
      page.head.append(script);
      page.close();
      this.frame = frame;
    }
    postMessage(data) {
      this.ready.then(() => this.target.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      removeEventListener("message", this.listen);
      this.frame.remove();
    }
  };
}
