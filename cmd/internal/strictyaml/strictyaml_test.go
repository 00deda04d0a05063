package strictyaml

import (
	"errors"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// What is wrong with a value is told with its place: a file has many durations.
func TestFaultsAreTold(t *testing.T) {
	type piece struct {
		TTL metav1.Duration `json:"ttl"`
	}
	type embedded struct {
		Refresh *metav1.Duration `json:"refresh"`
	}
	for name, tt := range map[string]struct{ text, want string }{
		"another unit":          {"svid: {ttl: 6hours}", `svid.ttl: "6hours" is no duration: write it like "90s" or "6h"`},
		"nothing":               {"svid: {ttl: null}", `svid.ttl: null is no duration`},
		"no value":              {"svid: {ttl: }", `svid.ttl: null is no duration`},
		"no text":               {"svid: {ttl: ''}", `svid.ttl: "" is no duration`},
		"a number":              {"svid: {ttl: 5}", "svid.ttl: 5 is no duration"},
		"no unit":               {"svid: {ttl: '360'}", `svid.ttl: "360" is no duration`},
		"a mapping":             {"svid: {ttl: {hours: 6}}", "svid.ttl: a mapping is no duration"},
		"a list":                {"svid: {ttl: [6h]}", "svid.ttl: a list is no duration"},
		"in a list":             {"parts: [{ttl: 1h}, {ttl: 1x}]", `parts[1].ttl: "1x" is no duration`},
		"in a mapping":          {"named: {a b: {ttl: 1x}}", `named.a b.ttl: "1x" is no duration`},
		"embedded":              {"refresh: 1x", `refresh: "1x" is no duration`},
		"several":               {"svid: {ttl: 1x}\nrefresh: 1y", "svid.ttl"},
		"several, the other":    {"svid: {ttl: 1x}\nrefresh: 1y", "refresh"},
		"long":                  {"refresh: " + strings.Repeat("x", 1000), strings.Repeat("x", 64) + `" is no duration`},
		"of its own kind":       {"own: x", "own: own says no"},
		"of another type":       {"svid: []", "svid"},
		"beside what is absent": {"refresh: null\nsvid: {ttl: 1x}", `svid.ttl: "1x" is no duration`},
	} {
		t.Run(name, func(t *testing.T) {
			var into struct {
				embedded
				SVID  piece            `json:"svid"`
				Parts []piece          `json:"parts"`
				Named map[string]piece `json:"named"`
				Own   refusing         `json:"own"`
			}
			err := Decode([]byte(tt.text), &into)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "time:") {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

type refusing struct{}

func (*refusing) UnmarshalJSON([]byte) error { return errors.New("own says no") }

func TestDecode(t *testing.T) {
	for name, tt := range map[string]struct{ text, want string }{
		"plain":                         {"name: a\n", ""},
		"a marker and comments before":  {"# a comment\n---\n# another\nname: a\n", ""},
		"an end marker":                 {"name: a\n...\n", ""},
		"a marker behind":               {"name: a\n---\n# nothing\n", ""},
		"content beside the marker":     {"--- {name: a}\n", ""},
		"a second document":             {"name: a\n---\nname: b\n", "several YAML documents"},
		"one behind an end marker":      {"name: a\n...\nname: b\n", "several YAML documents"},
		"a second one beside a marker":  {"name: a\n--- {name: b}", "several YAML documents"},
		"a key that is not known":       {"name: a\nage: 3\n", `unknown field "age"`},
		"a key in another case":         {"Name: a\n", `unknown field "Name"`},
		"a key twice":                   {"name: a\nname: b\n", `key "name" already set`},
		"dashes within a block of text": {"name: |\n  a\n  ---\n  b\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			var into struct {
				Name string `json:"name"`
			}
			err := Decode([]byte(tt.text), &into)
			switch {
			case tt.want == "" && (err != nil || !strings.HasPrefix(into.Name, "a")):
				t.Errorf("got %+v, %v", into, err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
