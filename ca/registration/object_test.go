package registration

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// Whatever a stranger puts into a name: one line, valid JSON, and the name in it.
func FuzzObject(f *testing.F) {
	for _, s := range []string{"", "web-1", `"`, `\`, "a\nb", "\x00", "\xff", "é", "</script>", "\u2028", `","outcome":"issued`} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		o := newObject(16)
		o.text("a", a)
		o.bool("yes", true)
		o.text("b", b)
		o.time("time", time.Unix(1, 5))
		o.milliseconds("ms", 1234567*time.Nanosecond)
		line := string(o.end())
		var got map[string]any
		if err := json.Unmarshal([]byte(line), &got); err != nil || strings.ContainsAny(line, "\n\r") {
			t.Fatalf("%q: %v", line, err)
		}
		want := map[string]any{"yes": true, "ms": 1.234}
		if a != "" {
			want["a"] = strings.ToValidUTF8(a, "�")
		}
		if b != "" {
			want["b"] = strings.ToValidUTF8(b, "�")
		}
		if at, err := time.Parse(time.RFC3339Nano, got["time"].(string)); err != nil || !at.Equal(time.Unix(1, 5)) {
			t.Errorf("time %v: %v", got["time"], err)
		}
		delete(got, "time")
		if len(got) != len(want) {
			t.Errorf("members %v, want %v", got, want)
		}
		for k, v := range want {
			if s, ok := v.(string); ok {
				// One mark for each bad byte here, one for each run of them there: what counts is that nothing else changed.
				if strings.ReplaceAll(got[k].(string), "�", "") != strings.ReplaceAll(s, "�", "") {
					t.Errorf("%s = %q, want %q", k, got[k], v)
				}
			} else if got[k] != v {
				t.Errorf("%s = %v, want %v", k, got[k], v)
			}
		}
	})
}
