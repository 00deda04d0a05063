package strictyaml

import (
	"strings"
	"testing"
)

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
