package registration

import (
	"encoding/json"
	"strconv"
	"sync"
	"time"
)

// object is a flat JSON object in the making. Every issuance writes two (evidence and audit line), with some twenty
// members each; through reflection or slog they cost more than its policy and lint together.
type object struct{ b []byte }

// lines are objects whose room is free again. A decision's line is written before its answer leaves, and nobody holds it.
var lines = sync.Pool{New: func() any { return newObject(1 << 10) }}

// newLine is a newObject for free to take back.
func newLine() *object {
	o := lines.Get().(*object) //nolint:errcheck // New makes nothing else
	o.b = append(o.b[:0], '{')
	return o
}

// free takes the object's room for another one. What end returned is not to be used any more.
func (o *object) free() {
	if cap(o.b) <= 4<<10 {
		lines.Put(o)
	}
}

func newObject(size int) *object { return &object{append(make([]byte, 0, size), '{')} }

// text adds a member, unless it is empty. Keys are our own and need no escaping.
func (o *object) text(key, value string) {
	if value == "" {
		return
	}
	o.key(key)
	if plain(value) {
		o.b = append(append(append(o.b, '"'), value...), '"')
		return
	}
	escaped, _ := json.Marshal(value) // of a string it cannot fail
	o.b = append(o.b, escaped...)
}

func (o *object) bool(key string, value bool) {
	o.key(key)
	o.b = strconv.AppendBool(o.b, value)
}

func (o *object) time(key string, value time.Time) {
	o.key(key)
	o.b = append(value.AppendFormat(append(o.b, '"'), time.RFC3339Nano), '"')
}

// milliseconds adds a duration with three decimals.
func (o *object) milliseconds(key string, d time.Duration) {
	o.key(key)
	o.b = strconv.AppendFloat(o.b, float64(d.Microseconds())/1000, 'f', -1, 64)
}

func (o *object) key(key string) {
	if len(o.b) > 1 {
		o.b = append(o.b, ',')
	}
	o.b = append(append(append(o.b, '"'), key...), '"', ':')
}

// end closes the object; nothing may be added to it.
func (o *object) end() []byte {
	o.b = append(o.b, '}')
	return o.b
}

// plain reports whether a string stands in JSON as it is: printable ASCII without quote and backslash.
func plain(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < 0x20 || c > 0x7e || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}
