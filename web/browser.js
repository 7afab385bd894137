// What the map asks of the browser: a memory for the page, and a way to hand a picture on.

const PREFIX = 'dydit.token_map.'

/** Remembers small things from one visit to the next, or till the page closes where the browser keeps nothing. */
export function pageMemory(storage) {
  return {
    get(name, otherwise) {
      try {
        return JSON.parse(storage().getItem(PREFIX + name)) ?? otherwise
      } catch {
        return otherwise
      }
    },
    set(name, value) {
      try {
        storage().setItem(PREFIX + name, JSON.stringify(value))
      } catch {
        // a full or forbidden store costs a preference, not the map
      }
    }
  }
}

/** Put a canvas on the clipboard as a PNG, or save it as a file where the page may not (plain http, older browsers). */
export async function sharePng(window, canvas, file) {
  const png = new Promise((resolve) => canvas.toBlob(resolve, 'image/png'))
  try {
    await window.navigator.clipboard.write([new window.ClipboardItem({ 'image/png': png })])
    return 'copied'
  } catch {
    const address = window.URL.createObjectURL(await png)
    Object.assign(window.document.createElement('a'), { href: address, download: file }).click()
    window.setTimeout(() => window.URL.revokeObjectURL(address), 60_000) // the browser may read it after the click
    return 'saved'
  }
}
