package main

import (
	"bytes"
	"encoding/json"
	"fmt"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"
)

const (
	formatTable = "table"
	formatJSON  = "json"
	formatYAML  = "yaml"
)

var formats = []string{formatTable, formatJSON, formatYAML}

// show prints value for programs, or what table draws for people.
func (c *cli) show(value any, table func(*page)) error {
	if c.format == formatTable {
		p := &page{now: c.now(), colour: c.colour}
		table(p)
		_, err := c.out.Write(p.bytes())
		return err
	}
	b, err := encode(value)
	if err != nil {
		return fmt.Errorf("writing %s: %w", c.format, err)
	}
	if c.format == formatYAML {
		if b, err = yaml.JSONToYAML(b); err != nil {
			return fmt.Errorf("writing yaml: %w", err)
		}
	}
	_, err = c.out.Write(b)
	return err
}

// encode gives the same bytes for the same value at every run, which protojson alone does not promise, and every field
// that has a value, zero values among them; messages that are not set are left out.
func encode(value any) ([]byte, error) {
	var raw []byte
	var err error
	if m, ok := value.(proto.Message); ok {
		raw, err = protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	} else {
		raw, err = json.Marshal(value)
	}
	if err != nil {
		return nil, err
	}
	var compact, out bytes.Buffer
	if err := json.Compact(&compact, raw); err != nil {
		return nil, err
	}
	if err := json.Indent(&out, compact.Bytes(), "", "  "); err != nil {
		return nil, err
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}

// message lets a protobuf message stand in a struct that encoding/json writes.
type message struct{ proto.Message }

// MarshalJSON is protojson's.
func (m message) MarshalJSON() ([]byte, error) {
	if m.Message == nil {
		return []byte("null"), nil
	}
	return protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m.Message)
}
