import { useEffect, useRef } from "preact/hooks";
import { models, pickSentence, view } from "./state";
import { Card, visible } from "./widgets";

/** The sentence that the target reads: typed, or one of the examples. */
export function Sentence() {
  const area = useRef<HTMLTextAreaElement>(null);
  const { text } = view.value;
  const examples = models.value?.examples.texts ?? [];
  useEffect(() => { if (area.current) area.current.value = text; }, [text]);
  const read = () => {
    const typed = area.current?.value ?? "";
    if (typed.trim()) pickSentence(typed);
  };
  const keyed = (event: KeyboardEvent) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    read();
  };
  return (
    <Card title="Sentence" id="sentence">
      <form class="sentence" onSubmit={(event) => { event.preventDefault(); read(); }}>
        <textarea ref={area} rows={2} aria-label="Sentence" aria-describedby="sentence-keys" spellcheck={false} onKeyDown={keyed} />
        <button type="submit" class="main">Read</button>
      </form>
      <div class="examples" role="group" aria-label="Example sentences">
        {examples.map((example) => (
          <button type="button" class="quiet" key={example} title={example} aria-pressed={example === text} onClick={() => pickSentence(example)}>
            {visible(example)}
          </button>
        ))}
      </div>
      <p id="sentence-keys" class="visually-hidden">Enter reads the sentence, shift and Enter begins a new line.</p>
    </Card>
  );
}
