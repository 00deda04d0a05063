package strictyaml

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"
)

// misread says which values of a document are not what their types read, each with its place, such as svid.ttl: what reads
// itself is told its text alone, and the decoder adds nothing. Nil: none of these is at fault.
func misread(js []byte, t reflect.Type, at string) error {
	for t.Kind() == reflect.Pointer {
		if string(js) == "null" {
			return nil
		}
		t = t.Elem()
	}
	if into, ok := reflect.New(t).Interface().(json.Unmarshaler); ok {
		err := into.UnmarshalJSON(js)
		switch {
		case err == nil:
			return nil
		case isDuration(t):
			return fmt.Errorf("%s: %s is no duration: write it like \"90s\" or \"6h\"", at, shown(js))
		}
		return fmt.Errorf("%s: %w", at, err)
	}
	var faults []error
	switch t.Kind() {
	case reflect.Struct:
		var members map[string]json.RawMessage
		_ = json.Unmarshal(js, &members) // of what is of another type the decoder says so, and where
		for f := range t.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if f.Anonymous && name == "" {
				faults = append(faults, misread(js, f.Type, at))
			} else if value, ok := members[name]; ok {
				faults = append(faults, misread(value, f.Type, strings.TrimPrefix(at+"."+name, ".")))
			}
		}
	case reflect.Map:
		var members map[string]json.RawMessage
		_ = json.Unmarshal(js, &members)
		for _, name := range slices.Sorted(maps.Keys(members)) {
			faults = append(faults, misread(members[name], t.Elem(), fmt.Sprintf("%s.%.64s", at, name)))
		}
	case reflect.Slice:
		var items []json.RawMessage
		_ = json.Unmarshal(js, &items)
		for i, value := range items {
			faults = append(faults, misread(value, t.Elem(), fmt.Sprintf("%s[%d]", at, i)))
		}
	}
	return errors.Join(slices.DeleteFunc(faults, func(err error) bool { return err == nil })...)
}

// isDuration knows what holds a time.Duration and nothing else, as metav1.Duration does.
func isDuration(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && t.NumField() == 1 && t.Field(0).Type == reflect.TypeFor[time.Duration]()
}

// shown is a value as a person wrote it, cut.
func shown(js []byte) string {
	var text string
	switch {
	case js[0] == '{':
		return "a mapping"
	case js[0] == '[':
		return "a list"
	case js[0] == '"' && json.Unmarshal(js, &text) == nil:
		return fmt.Sprintf("%.64q", text)
	}
	return fmt.Sprintf("%.64s", js)
}
