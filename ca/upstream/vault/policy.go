package vault

import (
	"fmt"
	"strings"
)

// need is a capability that the login must have.
type need struct {
	path, capability, why string
}

// needs is what the policy of a login grants at least, for an issuer.
func (u *Upstream) needs(issuer string) []need {
	all := []need{
		{u.issuerPath(issuer), "read", "the issuer's chain and usage"},
		{u.issuerPath(issuer) + "/sign-intermediate", "update", "to have it sign"},
		{renewSelf, "update", "to extend the login"},
	}
	if u.c.Auth.TokenFile != "" {
		all = append(all, need{lookupSelf, "read", "when the token ends"})
	}
	return all
}

// rule is a policy's text that grants a capability.
func rule(path, capability string) string {
	return fmt.Sprintf("path %q {\n  capabilities = [%q]\n}", path, capability)
}

// rules is the text that grants all of these.
func rules(lacking []need) string {
	var b strings.Builder
	for i, n := range lacking {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "# %s\n%s", n.why, rule(n.path, n.capability))
	}
	return b.String()
}
