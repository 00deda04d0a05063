package policy

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/meshca/meshca/api/refusal"
)

var code = regexp.MustCompile("`([^`]*)`")

// docs/policy.md is held to what it says: each YAML block is taken, and where a table follows, each of its lines is so.
func TestDocs(t *testing.T) {
	text, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(string(text), "```yaml\n")
	lines := 0
	for _, part := range parts[1:] {
		doc, after, _ := strings.Cut(part, "```\n")
		p := parse(t, doc)
		section, _, _ := strings.Cut(after, "\n#")
		for row := range strings.SplitSeq(section, "\n") {
			cells := strings.Split(strings.Trim(row, "|"), "|")
			if !strings.HasPrefix(row, "|") || len(cells) != 3 || strings.HasPrefix(row, "| account") || strings.HasPrefix(row, "|---") {
				continue
			}
			lines++
			d, err := p.Decide(t.Context(), documented(t, cells[0], cells[1]))
			if got, want := told(d, err), strings.TrimSpace(cells[2]); got != want {
				t.Errorf("%s\ngets %s (%v)", row, got, err)
			}
		}
	}
	if len(parts) != 7 || lines < 15 {
		t.Errorf("%d blocks and %d lines were looked at: the test proves little", len(parts)-1, lines)
	}
}

// documented is the input that a line of a table describes.
func documented(t *testing.T, account, pod string) Input {
	t.Helper()
	in := Input{Cluster: "prod"}
	in.Namespace, in.ServiceAccount, _ = strings.Cut(strings.TrimSpace(account), "/")
	for fact := range strings.SplitSeq(pod, ";") {
		if strings.TrimSpace(fact) == "" {
			continue
		}
		name, value, ok := strings.Cut(fact, ":")
		value = strings.TrimSpace(value)
		entries := map[string]string{}
		for _, pair := range strings.Fields(value) {
			key, v, _ := strings.Cut(pair, "=")
			entries[key] = v
		}
		switch found := code.FindStringSubmatch(name); {
		case !ok || found == nil:
			t.Fatalf("%q says nothing", fact)
		case found[1] == "pod.labels":
			in.PodLabels = entries
		case found[1] == "ns.labels":
			in.NamespaceLabels = entries
		case found[1] == "pod.name":
			in.Pod = value
		case found[1] == "node.name":
			in.Node = value
		default:
			t.Fatalf("nobody knows %s", name)
		}
	}
	return in
}

// told writes a decision as the tables do.
func told(d Decision, err error) string {
	if err != nil {
		return "`" + string(refusal.Of(err)) + "`"
	}
	ttl := strings.NewReplacer("m0s", "m", "h0m0s", "h").Replace(d.TTL.String())
	s := "`" + d.ID.Path() + "` for " + ttl
	for _, name := range slices.Sorted(slices.Values(d.DNSNames)) {
		s += ", `" + name + "`"
	}
	if d.Direct {
		s += ", direct"
	}
	if d.NodeVouched {
		s += ", node-vouched"
	}
	return s
}
