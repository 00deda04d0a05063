// Package strictyaml reads configuration files: what it does not understand to the letter, it refuses.
package strictyaml

import (
	"bytes"
	"errors"
	"reflect"

	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// Decode reads one YAML document by its keys to the letter, each of them once and known. yaml.UnmarshalStrict alone would
// take AGENTS for agents, of both in one mapping the later one without a word, and of several documents the first.
func Decode(data []byte, into any) error {
	if documents(data) > 1 {
		return errors.New("it holds several YAML documents, and only the first would be read: join them, or take the others out")
	}
	js, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		return err
	}
	strict, err := json.UnmarshalStrict(js, into)
	if err != nil {
		if placed := misread(js, reflect.TypeOf(into), ""); placed != nil {
			err = placed
		}
	}
	return errors.Join(append(strict, err)...)
}

// documents counts the documents that hold more than comments. A line that begins with --- or ... ends one wherever it
// stands (YAML 1.2 §9.1.2: no scalar may hold such a line).
func documents(data []byte) (n int) {
	content := false
	for line := range bytes.Lines(data) {
		if bytes.HasPrefix(line, []byte("---")) || bytes.HasPrefix(line, []byte("...")) {
			content, line = false, line[3:]
		}
		line = bytes.TrimSpace(line)
		if len(line) > 0 && line[0] != '#' && line[0] != '%' && !content {
			content = true
			n++
		}
	}
	return n
}
