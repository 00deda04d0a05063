package registration

import (
	"encoding/binary"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/attestor"
)

// What the Ring remembers of a decision: its fields one after the other, texts behind their lengths. Not among them are the
// error for which a caller is untrusted, which would hold a stranger's whole certificate and which the message tells, and a
// pod's labels and annotations, of which nothing is shown.

// times and texts are the fields that stand in the encoded form as they are, in its order.
func (d *Decision) times() [5]*time.Time {
	return [...]*time.Time{&d.Time, &d.NotAfter, &d.Caller.NotAfter, &d.Evidence.IssuedAt, &d.Evidence.ExpiresAt}
}

func (d *Decision) texts() [18]*string {
	e := &d.Evidence
	return [...]*string{
		&d.Event, &d.Door, &d.Caller.Address, &d.Caller.Serial, &d.Cluster, &e.Method, &e.ServiceAccountUID, &e.PodName, &e.PodUID,
		&e.NodeName, &e.NodeUID, &e.CredentialID, &d.Object, &d.Rule, &d.Outcome, &d.Message, &d.Claim, &d.Serial,
	}
}

// encode appends the encoded form.
func (d *Decision) encode(b []byte) []byte {
	for _, t := range d.times() {
		b = binary.AppendVarint(b, t.Unix())
		b = binary.AppendUvarint(b, uint64(t.Nanosecond()))
	}
	for _, text := range d.texts() {
		b = appendText(b, *text)
	}
	who := d.Evidence.Identity
	for _, text := range [...]string{d.ID.String(), d.Caller.ID.String(), who.Cluster(), who.Namespace(), who.ServiceAccount()} {
		b = appendText(b, text)
	}
	return append(b, flag(d.Evidence.Proven), flag(d.Evidence.Vouched))
}

// decode is the inverse of encode. Times have no monotonic reading any more.
func decode(b []byte) (d Decision) {
	r := reader{b}
	for _, t := range d.times() {
		if at := time.Unix(r.varint(), int64(r.uvarint())); !at.IsZero() {
			*t = at
		}
	}
	for _, text := range d.texts() {
		*text = r.text()
	}
	// Made of what such a value says of itself, none of these fails but for the empty text, which means the zero value.
	d.ID, _ = spiffeid.FromString(r.text())
	d.Caller.ID, _ = spiffeid.FromString(r.text())
	d.Evidence.Identity, _ = attestor.NewIdentity(r.text(), r.text(), r.text())
	d.Evidence.Proven, d.Evidence.Vouched = r.b[0] != 0, r.b[1] != 0
	return d
}

func appendText(b []byte, text string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(text))), text...)
}

func flag(set bool) byte {
	if set {
		return 1
	}
	return 0
}

// reader takes an encoded decision apart, from its beginning.
type reader struct{ b []byte }

func (r *reader) varint() int64 {
	v, n := binary.Varint(r.b)
	r.b = r.b[n:]
	return v
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	r.b = r.b[n:]
	return v
}

func (r *reader) text() string {
	n := r.uvarint()
	text := string(r.b[:n])
	r.b = r.b[n:]
	return text
}
