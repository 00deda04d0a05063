package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshca/meshca/api/kubesigner"
)

// unpublishCommand is what the chart runs when it is uninstalled. It takes flags and no configuration: that is gone by then.
func unpublishCommand() *cobra.Command {
	var o kubesigner.UnpublishOptions
	c := &cobra.Command{
		Use:   "unpublish --trust-domain DOMAIN",
		Short: "Delete from a cluster what a CA that is no more published there",
		Long: "Deletes the objects named by the flags, if they carry the mark of this trust domain (annotation meshca.io/trust-domain),\n" +
			"and leaves all others alone. The CA must have been ended before: it would put them back.",
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			o.Deleted = func(object string) { fmt.Fprintln(c.OutOrStdout(), "deleted", object) }
			return kubesigner.Unpublish(c.Context(), o)
		},
	}
	c.Flags().StringVar(&o.TrustDomain, "trust-domain", "", "the trust domain whose objects they are")
	c.Flags().StringVar(&o.Kubeconfig, "kubeconfig", "", "the cluster (default: the one that this pod runs in, as its service account)")
	c.Flags().StringVar(&o.ClusterTrustBundle, "cluster-trust-bundle", "", "name of a ClusterTrustBundle")
	c.Flags().StringSliceVar(&o.ConfigMaps, "config-map", nil, "NAMESPACE/NAME of a ConfigMap")
	c.Flags().StringSliceVar(&o.Everywhere, "config-map-everywhere", nil, "name of ConfigMaps in every namespace")
	c.PreRunE = func(*cobra.Command, []string) error {
		if o.TrustDomain == "" {
			return usageError{fmt.Errorf("`meshca unpublish` needs --trust-domain DOMAIN")}
		}
		for _, name := range o.ConfigMaps {
			if namespace, one, ok := strings.Cut(name, "/"); !ok || namespace == "" || one == "" || strings.Contains(one, "/") {
				return usageError{fmt.Errorf("--config-map: %q is not NAMESPACE/NAME", name)}
			}
		}
		return nil
	}
	return c
}
