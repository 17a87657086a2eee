import { entries, forget } from "./history";
import { Card, visible } from "./widgets";

/** What was asked before; each entry is a link to its view. */
export function HistoryCard() {
  if (!entries.value.length) return null;
  return (
    <Card title="History" id="history" aside={<button type="button" class="quiet" onClick={forget}>Clear</button>}>
      <ol class="entries">
        {entries.value.map(({ address, where, found, text }) => (
          <li key={address}>
            <a href={address} title={text}><b>{visible(found)}</b><span class="where">{where}</span><span class="of">{visible(text)}</span></a>
          </li>
        ))}
      </ol>
    </Card>
  );
}
